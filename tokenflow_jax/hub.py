"""Models on the Hugging Face hub, named hf://OWNER/NAME[@REVISION][/FILE or /FOLDER].

huggingface_hub fetches them into its own cache: its variables (HF_HOME, HF_HUB_OFFLINE,
HF_ENDPOINT) and its login hold here, too, and no token passes through this package.
"""

import contextlib
import functools
import glob
import os
import re
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

from tokenflow_jax.log import log
from tokenflow_jax.messages import one_line, shown

_SCHEME = "hf://"
_OTHER_KINDS = ("datasets/", "spaces/", "buckets/")  # fsspec opens those
_PATH = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/\w+/[^/]+|[^/]+))?(/(?P<inside>.+?))?/*"
)
# Other forms of the weights that a folder has as .safetensors.
_DOUBLES = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "onnx/*",
            "original/*")  # fmt: skip
_OLD_OWNERS = {"ByteFlow-AI": "ByteVisionLab"}


# By the name of huggingface_hub's error.
_REMEDIES = {
    "GatedRepoError": "its owner asks for consent; give it on the model's page, then log in",
    "RepositoryNotFoundError": "the hub has no such model, or it is private: log in",
    "RevisionNotFoundError": "the model has no such revision",
    "LocalEntryNotFoundError": "not in the hub's cache, and the hub cannot be reached or "
    "HF_HUB_OFFLINE is set",
    "EntryNotFoundError": "the model has no such file",
    "RemoteEntryNotFoundError": "the model has no such file",
}


class Release(NamedTuple):
    """Released weights of the paper's authors: a repository, or a file of it, and what it holds."""

    repo: str
    file: str  # "" for the whole repository
    stage: str
    variant: str  # of the stage
    purpose: str


RELEASES = (
    Release("ByteVisionLab/TokenFlow", "tokenflow_clipb_32k_enhanced.pt", "tokenizer",
            "b_256_enhanced", "256 px; the tokenizer of text to image"),
    Release("ByteVisionLab/TokenFlow", "tokenflow_siglip_32k.pt", "tokenizer",
            "xl", "384 px; the tokenizer of image to text"),
    Release("ByteVisionLab/TokenFlow-t2i", "", "generation",
            "7b", "text to image, Llama-2-7B"),
    Release("ByteVisionLab/Tokenflow-llava-qwen2.5-14B-finetuning", "", "understanding",
            "qwen2_5_14b", "image to text, Qwen2.5-14B"),
)  # fmt: skip


def is_model(path: str | os.PathLike) -> bool:
    """Tell the path of a model on the hub, which is fetched, from data that are read in place."""
    path = os.fspath(path)
    return path.startswith(_SCHEME) and not path.removeprefix(_SCHEME).startswith(_OTHER_KINDS)


def release_of(path: str | os.PathLike) -> Release | None:
    """Return the release that a path of the hub names, whatever its revision and former owner."""
    if not is_model(path):
        return None
    repo, _, inside = _parse(os.fspath(path))
    owner, _, name = repo.partition("/")
    repo = f"{_OLD_OWNERS.get(owner, owner)}/{name}".lower()
    known = (r for r in RELEASES if r.repo.lower() == repo and r.file in ("", inside))
    return next(known, None)


@functools.lru_cache(64)
def fetch(path: str, without: tuple[str, ...] = ()) -> str:
    """Return the local path of a file or folder of the hub; what the cache has is not fetched.

    Of a folder with .safetensors, other forms of the weights are left out, and all files with
    endings of `without`.

    Raises:
      ValueError: the package huggingface_hub is missing, or the path is not one of the hub.
      OSError: the hub does not have it, or cannot be reached.
    """
    repo, revision, inside = _parse(path)
    with _plain_errors(path):
        import huggingface_hub

        missing = None
        if "." in inside.rpartition("/")[2]:  # a file, as a rule
            try:
                return huggingface_hub.hf_hub_download(repo, inside, revision=revision)
            except huggingface_hub.errors.EntryNotFoundError as error:
                missing = error
        log.info("fetching %s into the hub's cache, unless it is there", path)
        ignored = [f"*{ending}" for ending in without]
        if not without and _has_safetensors(repo, revision, inside):
            ignored += _DOUBLES
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[name := glob.escape(inside), f"{name}/*"] if inside else None,
            ignore_patterns=ignored,
        )
        found = os.path.join(folder, inside) if inside else folder
        if not os.path.exists(found):
            raise missing or OSError(f"{repo} has no file or folder {shown(inside)}")
    return found


def push(folder: str | os.PathLike, repo: str, *, private: bool = False, message: str = "") -> str:
    """Upload a folder as the model `repo` of the hub and return the commit's address."""
    repo = repo.removeprefix(_SCHEME)
    with _plain_errors(repo):
        import huggingface_hub

        huggingface_hub.create_repo(repo, private=private, exist_ok=True)
        done = huggingface_hub.upload_folder(
            repo_id=repo,
            folder_path=os.fspath(folder),
            commit_message=message or "Upload a model",
            # Else an index of former shards would be read instead of one new file.
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    return str(done.commit_url)


@contextlib.contextmanager
def _plain_errors(path: str) -> Iterator[None]:
    """Raise what huggingface_hub and its HTTP library raise as one line with a remedy."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{path} needs huggingface_hub: pip install 'tokenflow_jax[hub]'"
        ) from error
    except Exception as error:
        reason = _REMEDIES.get(type(error).__name__) or one_line(error)
        raise OSError(f"{path}: {reason}") from error


def _parse(path: str) -> tuple[str, str | None, str]:
    """Return repository, revision and the path inside."""
    match = _PATH.fullmatch(path.removeprefix(_SCHEME))
    if not match:
        raise ValueError(f"{path!r}: name a model as hf://OWNER/NAME[@REVISION][/FILE]")
    revision = match["revision"] and urllib.parse.unquote(match["revision"])
    return match["repo"], revision, match["inside"] or ""


def _has_safetensors(repo: str, revision: str | None, inside: str) -> bool:
    import huggingface_hub

    try:
        names = huggingface_hub.list_repo_files(repo, revision=revision)
    except huggingface_hub.errors.OfflineModeIsEnabled:
        return False  # everything that is there was chosen once
    return any(n.endswith(".safetensors") for n in names if n.startswith(inside))
