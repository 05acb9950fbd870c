"""How text is cut into words before bytes are merged; merges never cross a cut.

Written so that the regular-expression engines of ``tokenizers`` and ``tiktoken`` agree. Runs of
whitespace are bounded: tiktoken's engine keeps a state for each character of an unbounded run
before a look-ahead, and panics beyond a million.
"""

from __future__ import annotations

_RUN = 512
_CONTRACTION = r"'(?:[sdmtSDMT]|ll|LL|ve|VE|re|RE)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_DIGITS = r"\p{N}{1,3}"
_BLANKS = rf"\s{{1,{_RUN}}}(?!\S)|\s"

# GPT-4's (cl100k_base), but for the bound and for contractions in mixed case.
GPT4 = "|".join(
    [
        _CONTRACTION,
        _WORD,
        _DIGITS,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        rf"\s{{0,{_RUN}}}[\r\n]+",
        _BLANKS,
    ]
)

# GPT-4's, with the indentation of the next line in one piece with the line break: in source
# code the two go together.
CODE = "|".join(
    [
        _CONTRACTION,
        _WORD,
        _DIGITS,
        r" ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?",
        rf"\s{{0,{_RUN}}}[\r\n]+[ \t]*",
        _BLANKS,
    ]
)

# GPT-2's, but for the bound.
GPT2 = "|".join(
    [
        r"'(?:[sdmt]|ll|ve|re)",
        r" ?\p{L}+",
        r" ?\p{N}+",
        r" ?[^\s\p{L}\p{N}]+",
        _BLANKS,
    ]
)

PATTERNS = {"gpt4": GPT4, "code": CODE, "gpt2": GPT2}
