"""How ccrun reaches other servers: the operator's HTTP proxies and certificate authorities."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import attrs

from ccrun.config import Config
from ccrun.errors import ConfigError
from ccrun.task import Secret

#: Files in which systems have the certificates that they trust: Debian, Fedora, Alpine and macOS.
SYSTEM_CA_FILES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)
#: Hosts on this machine, which no proxy reaches.
_LOOPBACK: Final = ("localhost", "::1")


@attrs.frozen(kw_only=True)
class Egress:
    """The way to other servers. Created by `open_egress`; without arguments, it is direct.

    Args:
        http_proxy: The proxy for http URLs. It may contain `user:password@`.
        https_proxy: The proxy for https URLs.
        no_proxy: Hosts that are reached directly, as in `NO_PROXY`: names, which include those below them, separated by commas.
        agent_http_proxy: The proxy of the agent's own traffic, without a password.
        agent_https_proxy: The same for https URLs.
        ca_bundle: All trusted certificates in PEM form; None for those of the system.
        tls: The trusted certificates, for aiohttp.
    """

    http_proxy: Secret | None = None
    https_proxy: Secret | None = None
    no_proxy: str = ""
    agent_http_proxy: str | None = None
    agent_https_proxy: str | None = None
    ca_bundle: bytes | None = attrs.field(default=None, repr=False)
    tls: ssl.SSLContext | bool = True

    def proxy_for(self, url: str) -> str | None:
        """Return the URL of the proxy for a URL, None if the server is reached directly."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        proxy = self.https_proxy if parts.scheme == "https" else self.http_proxy
        is_loopback = host in _LOOPBACK or host.startswith("127.")
        return None if proxy is None or is_loopback or self._is_direct(host) else proxy.reveal()

    def agent_proxy_for(self, url: str) -> str | None:
        """Return the URL of the proxy for a URL that the agent asks for, None if the server is reached directly."""
        parts = urlsplit(url)
        proxy = self.agent_https_proxy if parts.scheme == "https" else self.agent_http_proxy
        return None if self._is_direct(parts.hostname or "") else proxy

    def _is_direct(self, host: str) -> bool:
        names = (name.strip().lower().removeprefix("*").removeprefix(".") for name in self.no_proxy.split(","))
        return "*" in self.no_proxy.split(",") or any(name and f".{host}".endswith(f".{name}") for name in names)

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """The passwords of the proxies."""
        found = [
            urlsplit(proxy.reveal()).password for proxy in (self.http_proxy, self.https_proxy) if proxy is not None
        ]
        return tuple(Secret(password) for password in found if password)

    @property
    def agent_gets_proxies(self) -> bool:
        """Whether the agent uses a proxy for each kind of URL for which ccrun uses one."""
        pairs = ((self.http_proxy, self.agent_http_proxy), (self.https_proxy, self.agent_https_proxy))
        return all(proxy is None or of_agent is not None for proxy, of_agent in pairs)

    @property
    def shown(self) -> dict[str, str]:
        """The proxies without their passwords, for the log."""
        proxies = {
            "httpProxy": self.http_proxy and without_password(self.http_proxy.reveal()),
            "httpsProxy": self.https_proxy and without_password(self.https_proxy.reveal()),
            "noProxy": self.no_proxy,
            "agentHttpProxy": self.agent_http_proxy,
            "agentHttpsProxy": self.agent_https_proxy,
        }
        return {name: value for name, value in proxies.items() if value}

    def git_variables(self, bundle: Path | None) -> dict[str, str]:
        """Return the variables that configure git of the worker.

        Args:
            bundle: A file with `ca_bundle`.
        """
        proxies = {"http_proxy": self.http_proxy, "https_proxy": self.https_proxy}
        variables = {name: proxy.reveal() for name, proxy in proxies.items() if proxy is not None}
        if variables:
            variables["no_proxy"] = ",".join(filter(None, (self.no_proxy, "127.0.0.1", *_LOOPBACK)))
        return variables if bundle is None else {**variables, "GIT_SSL_CAINFO": str(bundle)}

    def agent_variables(self, bundle: Path | None) -> dict[str, str]:
        """Return the variables that configure the programs of the agent.

        Args:
            bundle: A file with `ca_bundle` that the agent can read.
        """
        proxies = {"http_proxy": self.agent_http_proxy, "https_proxy": self.agent_https_proxy}
        found = {name: value for name, value in proxies.items() if value is not None}
        # Programs differ in which spelling they read.
        variables = {**found, **{name.upper(): value for name, value in found.items()}}
        if found and self.no_proxy:
            variables["NO_PROXY"] = self.no_proxy
        if bundle is not None:
            variables |= dict.fromkeys(
                ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
                str(bundle),
            )
        return variables


def open_egress(config: Config) -> Egress:
    """Return the way to other servers that a config describes. Reads files, so it blocks.

    Raises:
        ConfigError: A file has no certificates.
    """
    if config.agent_proxy is None:
        agent = [_without_credential(proxy) for proxy in (config.http_proxy, config.https_proxy)]
    else:
        agent = [None if config.agent_proxy == "none" else config.agent_proxy] * 2
    tls, bundle = _trusted(config)
    return Egress(
        http_proxy=config.http_proxy,
        https_proxy=config.https_proxy,
        no_proxy=config.no_proxy,
        agent_http_proxy=agent[0],
        agent_https_proxy=agent[1],
        ca_bundle=bundle,
        tls=tls,
    )


def without_password(url: str) -> str:
    """Return the URL of a proxy without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _without_credential(proxy: Secret | None) -> str | None:
    """Return the proxy if it has no password, which the agent must not get."""
    if proxy is None or without_password(proxy.reveal()) != proxy.reveal():
        return None
    return proxy.reveal()


def _trusted(config: Config) -> tuple[ssl.SSLContext | bool, bytes | None]:
    if config.ssl_cert_file is None and config.node_extra_ca_certs is None:
        return True, None
    pieces = []
    if config.ssl_cert_file is not None:
        pieces.append(_certificates("SSL_CERT_FILE", config.ssl_cert_file))
    else:
        pieces += [Path(file).read_bytes() for file in SYSTEM_CA_FILES if Path(file).exists()][:1]
    if config.node_extra_ca_certs is not None:
        pieces.append(_certificates("NODE_EXTRA_CA_CERTS", config.node_extra_ca_certs))
    context = ssl.create_default_context()
    for piece in pieces:
        context.load_verify_locations(cadata=piece.decode("ascii", "replace"))
    return context, b"\n".join(pieces)


def _certificates(name: str, file: Path) -> bytes:
    try:
        content = file.read_bytes()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii"))
    except (OSError, ValueError):
        raise ConfigError(f"{name} must name a readable file with certificates in PEM form.") from None
    return content
