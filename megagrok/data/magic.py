"""What kind of file begins with these bytes? Used only to make a refusal say what the file probably is.

Not a detector for any other purpose: nothing is ever read differently because of the answer.
"""

_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xfe", "UTF-16; convert with: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16; convert with: iconv -f UTF-16 -t UTF-8"),
    (b"\x1f\x8b", "gzip; name it .gz or unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstandard; name it .zst or unpack it"),
    (b"BZh", "bzip2; name it .bz2 or unpack it"),
    (b"\xfd7zXZ\x00", "xz; name it .xz or unpack it"),
    (b"PK", "zip"),
    (b"PAR1", "parquet; use kind: parquet"),
    (b"MMIDIDX", "a Megatron index; use data.tokens"),
    (b"\x80\x02", "pickle"),
    (b"\x80\x04", "pickle"),
    (b"\x93NUMPY", "a numpy array"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself"),
)


def kind_of_bytes(head: bytes) -> str | None:
    """The likely kind of a file from its first bytes, as words for an error message; None if nothing is recognised."""
    for prefix, kind in _KINDS:
        if head.startswith(prefix):
            return kind
    return None


def explain_bytes(head: bytes) -> str:
    """' (0xff 0xfe = UTF-16; ...)' for the end of a message, or the empty string."""
    kind = kind_of_bytes(head)
    if kind is None:
        return ""
    return f" ({' '.join(f'0x{byte:02x}' for byte in head[:2])} = {kind})"
