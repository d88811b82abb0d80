"""Continued pre-training."""

from .causal_lm import CausalLMModule


class PretrainModule(CausalLMModule):
    """Continued pre-training: every token of a document is learnt from, in the paper's sense of adaptation.

    Its arguments and everything it does are `CausalLMModule`'s; it has its own name so that a configuration says what
    it is for, and so that subclasses of pre-training and of instruction tuning can be told apart.
    """
