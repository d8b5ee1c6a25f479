"""Signatures of requests to AWS."""

from __future__ import annotations

import datetime as dt

import pytest

from ccrun.task import Secret
from ccrun.worker.sigv4 import AwsCredential, signed_headers

#: The credential of AWS's test suite for Signature Version 4, which everybody knows.
EXAMPLE = AwsCredential(
    access_key_id="AKIDEXAMPLE", secret_access_key=Secret("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
)
AT = dt.datetime(2015, 8, 30, 12, 36, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("method", "url", "headers", "body", "signature"),
    [
        # get-vanilla
        (
            "GET",
            "https://example.amazonaws.com/",
            {},
            b"",
            "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        ),
        # get-vanilla-query-order-key-case
        (
            "GET",
            "https://example.amazonaws.com/?Param2=value2&Param1=value1",
            {},
            b"",
            "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
        ),
        # post-vanilla
        (
            "POST",
            "https://example.amazonaws.com/",
            {},
            b"",
            "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
        ),
        # post-header-key-sort
        (
            "POST",
            "https://example.amazonaws.com/",
            {"My-Header1": "value1"},
            b"",
            "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c",
        ),
        # post-x-www-form-urlencoded
        (
            "POST",
            "https://example.amazonaws.com/",
            {"Content-Type": "application/x-www-form-urlencoded"},
            b"Param1=value1",
            "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
        ),
    ],
)
def test_signatures_are_those_of_the_test_suite(
    method: str, url: str, headers: dict[str, str], body: bytes, signature: str
) -> None:
    """The vectors of AWS's test suite (aws-sig-v4-test-suite), whose headers include `Host` and `X-Amz-Date`."""
    signed = signed_headers(
        EXAMPLE, method=method, url=url, headers=headers, body=body, service="service", region="us-east-1", at=AT
    )
    assert "20150830T123600Z" == signed["X-Amz-Date"]
    assert signed["Authorization"].endswith(f"Signature={signature}")


def test_session_token_is_signed() -> None:
    """A temporary credential is valid with its token only."""
    credential = AwsCredential(
        access_key_id="A", secret_access_key=Secret("b"), session_token=Secret("made-up-session-token")
    )
    signed = signed_headers(
        credential, method="POST", url="https://a.invalid/", headers={}, body=b"", service="s", region="r", at=AT
    )
    assert "made-up-session-token" == signed["X-Amz-Security-Token"]
    assert "SignedHeaders=host;x-amz-date;x-amz-security-token," in signed["Authorization"]
