"""JuiceFS' kinds of storage: why a run moves a volume to and from two of them alone."""

from __future__ import annotations

#: The kinds of storage whose objects this project can reach: both speak S3.
S3_STORAGES = ("minio", "s3")
#: Others of JuiceFS 1.4 (pkg/object): by the SDK of S3, and by that of each vendor.
_BUCKET_IN_HOST = frozenset({"eos", "ks3", "oos", "scw", "space", "wasabi"})
_OWN_PROTOCOL = frozenset(
    {
        "b2", "bos", "bunny", "cos", "gs", "ibmcos", "obs", "oss", "qingstor", "qiniu", "storj", "swift", "tos",
        "ufile", "wasb",
    }
)  # fmt: skip
#: What a person does where the run does not, with keys and with everything else.
BY_HAND = (
    "by hand, with clients that follow as they do here: for other keys of the same bucket `juicefs config --access-key "
    "… --secret-key …` and the Secret; for another store copy with `juicefs sync`, which speaks every kind, then "
    "`juicefs config --storage … --bucket …` and the Secret"
)


def why_not(kind: str) -> str:
    """Say why a run does not move a volume to or from a kind of storage; empty where it does.

    Not for other keys alone either: the blocks that prove the clients are looked for by S3.

    Args:
        kind: In lower case.
    """
    if kind in S3_STORAGES:
        return ""
    if kind in _BUCKET_IN_HOST:
        return "JuiceFS takes bucket and region of this kind from the host's name, which no test here has tried"
    if kind in _OWN_PROTOCOL:
        return "JuiceFS speaks the vendor's own protocol to this kind, and Airflow S3"
    return "JuiceFS reaches no store that speaks S3 by this kind"
