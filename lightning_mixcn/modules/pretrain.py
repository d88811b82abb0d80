"""Continued pre-training."""

from .causal_lm import CausalLMModule


class PretrainModule(CausalLMModule):
    """Continued pre-training: the model learns from every token of a document, as in the Chinese-Mixtral paper.

    Its arguments and everything it does are `CausalLMModule`'s; it has its own name so that a configuration says what
    it is for, and so that subclasses of pre-training and of instruction tuning differ in type.
    """
