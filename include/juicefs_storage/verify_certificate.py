"""Verify a certificate of juicefs_storage_finish: `python -m include.juicefs_storage.verify_certificate FILE KEY`.

It works offline, with the file and the public key alone. docs/finish.md says when and how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.finish.certificate import verify


def main(words: Sequence[str]) -> int:
    """Run the command; 0: the certificate is good, 1: it is not, 2: the command is wrong."""
    parser = argparse.ArgumentParser(prog="verify_certificate", description=__doc__)
    parser.add_argument("file", type=Path, help="the certificate: XCom `certificate` of task certify")
    parser.add_argument("public_key", help="base64, kept since the key was made")
    options = parser.parse_args(words)
    try:
        evidence = verify(options.file.read_text(), options.public_key)
    except StorageSwitchError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{options.file} cannot be read: {error.strerror}.", file=sys.stderr)
        return 1
    print(f"Good. Volume {evidence.volume} ({evidence.uuid}) is on {evidence.bucket} and has left {evidence.left}.")
    print(f"Certified at {evidence.at:%Y-%m-%d %H:%M} UTC by run {evidence.run_id}:")
    for claim in evidence.claims:
        print(f"- {claim.what}: {claim.seen}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
