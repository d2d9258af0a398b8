"""Signatures against botocore's."""

from __future__ import annotations

from unittest.mock import patch
from urllib.parse import quote

from hypothesis import given, settings
from hypothesis import strategies as st

from include.juicefs_storage.adapters.s3.signing import Signer

KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(deadline=None)
@given(
    KEYS,
    st.lists(st.tuples(st.from_regex(r"\Ax-amz-meta-[a-z]{1,4}\Z"), st.text("a b,é", max_size=9)), max_size=3),
    st.sampled_from(["", "to+k/en=="]),
)
def test_signatures_are_botocores(key: str, metadata: list[tuple[str, str]], token: str) -> None:
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    path = f"/bucket/{quote(key, safe='/~')}"
    signer = Signer("s3.example:9000", "eu-west-1", "AKID", "se+cr/et", token)
    on_the_wire = tuple((name, value.encode().decode("latin-1")) for name, value in dict(metadata).items())
    with patch("time.time", return_value=1_700_000_000.5):
        text = signer.head("PUT", path, "partNumber=1&uploadId=a%2Bb", on_the_wire, 3).decode("latin-1")
    ours = dict(line.split(": ", 1) for line in text.split("\r\n")[1:] if line)
    request = AWSRequest(
        "PUT",
        f"http://s3.example:9000{path}?partNumber=1&uploadId=a%2Bb",
        headers={
            **dict(metadata),
            "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
            "x-amz-date": ours["x-amz-date"],
            **({"x-amz-security-token": token} if token else {}),
        },
    )
    request.context.update(timestamp=ours["x-amz-date"], payload_signing_enabled=False)
    theirs = S3SigV4Auth(Credentials("AKID", "se+cr/et", token or None), "s3", "eu-west-1")
    canonical = theirs.canonical_request(request)
    signature = theirs.signature(theirs.string_to_sign(request, canonical), request)
    assert ours["x-amz-date"] == "20231114T221320Z"
    assert ours["content-length"] == "3"
    assert ours["authorization"].endswith(f"Signature={signature}")
