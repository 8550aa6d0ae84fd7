"""Whatever a candidate raises becomes an error that names the candidate."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ktonum.case.interpreter_trust import refusing_bfloat16_of_the_interpreter
from ktonum.case.out_of_memory import is_out_of_memory
from ktonum.errors import CandidateError, KtonumError

__all__ = ["candidate_errors"]


@contextmanager
def candidate_errors() -> Iterator[None]:
    """Within: what the candidate raises becomes a `CandidateError` with its traceback.

    Raises:
        CandidateError: See there.
        UsageError: Its kernels ran in Triton's interpreter and calculated in bfloat16, which comes out wrong there.
    """
    try:
        with refusing_bfloat16_of_the_interpreter():
            yield
    except KtonumError:
        raise
    except Exception as error:  # whatever the candidate raises
        if is_out_of_memory(error):  # the audit's own tensors take memory, too: not its fault alone
            raise
        raise CandidateError(f"raised {type(error).__name__}: {error}\n{traceback.format_exc()}") from error
