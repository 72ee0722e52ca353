"""Access tokens that must not be believed: each is a valid one with one thing wrong."""

from __future__ import annotations

import base64
import hmac
import json
import time
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

HEADER = {"alg": "HS256", "typ": "JWT"}


def encode(raw: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def sign(header: Any, claims: Any, key: str | bytes, digest: str = "sha256") -> str:
    """A token of any header and claims; text goes in as it is."""
    parts = [item if isinstance(item, str) else json.dumps(item, separators=(",", ":")) for item in (header, claims)]
    signed = ".".join(encode(part.encode()) for part in parts)
    key = key.encode() if isinstance(key, str) else key
    return signed + "." + encode(hmac.new(key, signed.encode(), digest).digest())


def good_claims(user_id: int, session_id: int, now: float | None = None) -> dict[str, Any]:
    """The claims of a token that works at `now`, in seconds since 1970; without it, by the machine's clock."""
    now = int(time.time() if now is None else now)
    return {
        "sub": str(user_id),
        "iat": now,
        "exp": now + 3600,
        "jti": "0123456789abcdef",
        "sid": str(session_id),
        "typ": "access",
    }


def forgeries(user_id: int, session_id: int, key: str, now: float | None = None) -> dict[str, str]:
    """What is wrong with it at `now`, to the token. All but the first few are signed with the right key."""
    claims = good_claims(user_id, session_id, now)
    now = claims["iat"]
    good = sign(HEADER, claims, key)
    head, body, signature = good.split(".")
    public = (
        rsa.generate_private_key(65537, 2048)
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )

    def changed(**changes: Any) -> str:
        return sign(HEADER, {**claims, **changes}, key)

    def without(name: str) -> str:
        return sign(HEADER, {k: v for k, v in claims.items() if k != name}, key)

    def headed(**changes: Any) -> str:
        return sign({**HEADER, **changes}, claims, key)

    text = json.dumps(claims, separators=(",", ":"))
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    # 32 bytes fill 42 characters and two thirds of a 43rd: the rest of its bits decode to nothing.
    twin = signature[:-1] + last[last.index(signature[-1]) ^ 1]
    return {
        "another key": sign(HEADER, claims, "another key that is 32 bytes long ..."),
        "an empty key": sign(HEADER, claims, b""),
        "no signature": f"{head}.{body}.",
        "half a signature": f"{head}.{body}.{signature[:20]}",
        "the signature of another": f"{head}.{encode(text.replace(str(user_id), '999').encode())}.{signature}",
        "alg none": sign({**HEADER, "alg": "none"}, claims, key),
        "alg none, unsigned": f"{encode(json.dumps({**HEADER, 'alg': 'none'}).encode())}.{body}.",
        "alg None": sign({**HEADER, "alg": "None"}, claims, key),
        "alg nOnE": sign({**HEADER, "alg": "nOnE"}, claims, key),
        "alg missing": sign({"typ": "JWT"}, claims, key),
        "alg HS512": sign({**HEADER, "alg": "HS512"}, claims, key, "sha512"),
        "alg RS256 with the key as HMAC": sign({**HEADER, "alg": "RS256"}, claims, key),
        "HMAC with a public key": sign(HEADER, claims, public),
        "alg a list": headed(alg=["HS256"]),
        "header typ at+jwt": headed(typ="at+jwt"),
        "header with jku": headed(jku="https://evil.example/keys"),
        "header with x5u": headed(x5u="https://evil.example/cert"),
        "header with jwk": headed(jwk={"kty": "oct", "k": encode(key.encode())}),
        "header with kid": headed(kid="1"),
        "kid a path": headed(kid="../../dev/null"),
        "header with crit": headed(crit=["exp"]),
        "header with b64 false": headed(b64=False, crit=["b64"]),
        "header no object": sign("[]", claims, key),
        "header no JSON": sign("{", claims, key),
        "header with spaces": sign(json.dumps(HEADER) + "junk", claims, key),
        "no sub": without("sub"),
        "no iat": without("iat"),
        "no exp": without("exp"),
        "no jti": without("jti"),
        "no sid": without("sid"),
        "no typ": without("typ"),
        "sub a number": changed(sub=user_id),
        "sub with a sign": changed(sub=f"+{user_id}"),
        "sub with a space": changed(sub=f" {user_id}"),
        "sub with a zero before it": changed(sub=f"0{user_id}"),
        "sub in other digits": changed(sub="١"),
        "sub empty": changed(sub=""),
        "sub null": changed(sub=None),
        "sub of somebody else": changed(sub=str(user_id + 1)),
        "sub huge": changed(sub="9" * 400),
        "sid a number": changed(sid=session_id),
        "sid of no session": changed(sid="9007199254740991"),
        "jti a number": changed(jti=1),
        "typ refresh": changed(typ="refresh"),
        "typ Access": changed(typ="Access"),
        "typ a list": changed(typ=["access"]),
        "expired": changed(iat=now - 7200, exp=now - 3600),
        "expired just now": changed(iat=now - 3600, exp=now),
        "exp far away": changed(exp=now + 10 * 365 * 86400),
        "exp beyond all dates": changed(iat=10**17, exp=10**17 + 60),
        "exp before iat": changed(iat=now + 7200, exp=now + 3600),
        "exp a string": changed(exp=str(now + 3600)),
        "exp a fraction": changed(exp=now + 3600.5),
        "exp true": changed(exp=True),
        "exp infinite": sign(HEADER, text.replace(str(now + 3600), "Infinity"), key),
        "exp with 5,000 digits": sign(HEADER, text.replace(str(now + 3600), "9" * 2500), key),
        "not yet valid": changed(nbf=now + 3600),
        "for another audience": changed(aud="somebody-else"),
        "claims no object": sign(HEADER, "[]", key),
        "claims no JSON": sign(HEADER, "{", key),
        "claims deep": sign(HEADER, "[" * 1400 + "]" * 1400, key),
        "claims with spaces": sign(HEADER, json.dumps(claims), key),
        "claims doubled": sign(HEADER, text[:-1] + f',"sub":"{user_id}"}}', key),
        "a twin of the signature": f"{head}.{body}.{twin}",
        "padded": good + "=",
        "padded twice": f"{head}=.{body}=.{signature}=",
        "a space behind": good + " ",
        "a tab before": "\t" + good,
        "a space within": f"{head}. {body}.{signature}",
        "plain base64": good.replace("-", "+").replace("_", "/") + "+",
        "two parts": f"{head}.{body}",
        "four parts": good + "." + signature,
        "a dot behind": good + ".",
        "JSON": json.dumps({"payload": body, "protected": head, "signature": signature}),
        "too long": sign(HEADER, {**claims, "jti": "x" * 5000}, key),
        "a word": "token",
        "nothing": "",
    }
