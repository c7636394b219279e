"""What is on the Hugging Face hub, found or refused in one message. Downloads nothing."""

from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from spd.config import Unreachable, UserError

NO_NETWORK = "pydoc_emb is the experiment that needs no network"
SECONDS = 20


def hub_commit(
    name: str, kind: Literal["model", "dataset"], revision: str | None, place: str
) -> str | None:
    """The commit that `revision` of a repository stands for; None where HF_HUB_OFFLINE is set.

    `UserError` if the hub knows no such repository or revision, `Unreachable` if it does not answer;
    both begin with `place`.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS).sha
    except GatedRepoError:
        raise UserError(f"{place}: {name!r} is gated on the hub; it needs HF_TOKEN") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{place}: {name!r} is neither a local file or directory nor a {kind} on the hub (a"
            " private one needs HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{place}: {name!r} has no revision {revision!r} on the hub") from None
    except (OSError, HfHubHTTPError) as error:
        raise unreachable(name, place, error) from None
    except Exception as error:
        # the HTTP client raises these; which client the hub's library uses changes between its releases
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise unreachable(name, place, error) from None


def unreachable(name: str, place: str, error: Exception) -> Unreachable:
    """What to raise where the hub, or the cache in its place, does not give `name`."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if constants.HF_HUB_OFFLINE:
        return Unreachable(
            f"{place}: {name!r} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it;"
            f" {NO_NETWORK}"
        )
    return Unreachable(
        f"{place}: the Hugging Face hub cannot be reached for {name!r} ({reason}); what was fetched"
        f" before is taken with HF_HUB_OFFLINE=1; {NO_NETWORK}"
    )
