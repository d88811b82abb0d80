"""The subcommands ``report`` and ``push``: a run as one page, and its adapter, or an export, on the hub."""

from pathlib import Path

from lightning_mixcn.arguments import Name


def report(run: Name, *, out: Name, overwrite: bool = False) -> None:
    """Write a run as one HTML page that needs no server and no network.

    It says what was trained on what, and shows curves, bits per byte by source before and after, expert load, long
    contexts, samples side by side, benchmarks, preferences, the memory and speed that were planned beside those that
    were measured, versions and command: whatever the run's folder holds. A run that goes on, or was killed, is shown as
    far as it came.

    Args:
        run: Folder of the run. Paths in its configuration are taken from the folder that this command is called in.
        out: HTML file to write.
        overwrite: Replace the file if it exists.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no run, or a damaged file of one.
        FileExistsError: the file exists, and `overwrite` is not given.
    """
    from .page import write_report_page

    write_report_page(Path(run).expanduser(), Path(out).expanduser().resolve(), overwrite=overwrite)


def push(src: Name, name: Name, *, private: bool = False, dry_run: bool = False) -> None:
    """Put a run's adapter, or an export, on the Hugging Face hub, with its model card.

    Of a run its folder adapter/ is sent, of an export all of it; hidden files stay here. Before anything is sent it is
    checked that the folder is whole, has a card, and holds no pickles. huggingface_hub sends it, with the token of
    `hf auth login` or of HF_TOKEN.

    Args:
        src: Folder of a run, or one that `mixcn export` wrote.
        name: Repository as owner/name; it is made where there is none, and gets a further commit where there is one.
        private: Let only the owner see the repository.
        dry_run: List what would be sent, and send nothing; no token is needed.

    Raises:
        FileNotFoundError: there is no such folder, or it is not whole.
        ValueError: the name cannot be one, the folder holds pickles, there is no token, or the hub refuses or cannot be
            reached.
    """
    from .upload import push_folder

    push_folder(Path(src).expanduser(), name, private=private, dry_run=dry_run)
