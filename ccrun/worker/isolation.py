"""How the agent of a task is isolated: what this machine allows, what the operator requires and what the request asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from ccrun.agent_sandbox import isolation_of
from ccrun.egress import Egress
from ccrun.errors import CcrunError
from ccrun.process.confinement import Confinement
from ccrun.process.sandbox import Sandbox
from ccrun.process.user import User
from ccrun.results import AGENT_NETWORKS, AgentNetwork, Isolation, IsolationLevel
from ccrun.spec import TaskSpec
from ccrun.worker import egress_proxy
from ccrun.worker.egress_proxy import EgressProxy, HostPolicy
from ccrun.worker.proxy import CredentialProxy


class IsolationUnavailable(CcrunError):
    """The agent cannot be isolated as it must be."""


@attrs.frozen(kw_only=True)
class IsolationPolicy:
    """What the operator allows and requires.

    Args:
        user: The user of the agent's processes, None for the worker's own.
        is_required: Whether a task fails where there is no sandbox.
        find_sandbox: Returns the sandbox of this machine, or why there is none. Blocks.
        network: The widest network of an agent, and the one of a request that asks for none.
        allowed_hosts: With `AgentNetwork.ALLOWLIST`, the hosts that an agent may reach.
        private_hosts: Hosts that an agent may reach although their addresses are not public.
    """

    user: User | None = None
    is_required: bool = False
    find_sandbox: Callable[[], Sandbox | str] = lambda: "This worker has no sandbox."
    network: AgentNetwork = AgentNetwork.PUBLIC
    allowed_hosts: frozenset[str] = frozenset()
    private_hosts: frozenset[str] = frozenset()

    async def confinement(self) -> tuple[Confinement, Isolation]:
        """Return the best confinement of this machine, after a trial.

        Raises:
            IsolationUnavailable: A sandbox is required, and does not work.
        """
        found = await asyncio.to_thread(self.find_sandbox)
        if self.is_required and not isinstance(found, Sandbox):
            raise IsolationUnavailable(f"The agent must run in a sandbox (CCRUN_SANDBOX=required). {found}")
        isolation = isolation_of(found, network=self.network, has_user=self.user is not None)
        return Confinement(user=self.user, sandbox=found if isinstance(found, Sandbox) else None), isolation

    def network_of(self, spec: TaskSpec, isolation: Isolation) -> tuple[Isolation, HostPolicy]:
        """Return the isolation with the network of a task, and what the task may reach.

        Raises:
            IsolationUnavailable: The network cannot be limited without a sandbox.
        """
        network = min(spec.network or self.network, self.network, key=AGENT_NETWORKS.index)
        if isolation.level is not IsolationLevel.SANDBOX:
            if network is not AgentNetwork.PUBLIC:
                raise IsolationUnavailable(
                    f"The network of the agent cannot be limited to `{network}` without a sandbox. "
                    + " ".join(isolation.reasons)
                )
            return isolation, HostPolicy()
        lists = [frozenset(map(str.lower, spec.allowed_hosts))] if spec.allowed_hosts else []
        if self.network is AgentNetwork.ALLOWLIST:
            lists.append(self.allowed_hosts)
        policy = HostPolicy(allowed=tuple(lists), private=self.private_hosts)
        return attrs.evolve(isolation, network=network), policy


@attrs.frozen(kw_only=True)
class AgentServers:
    """What an agent reaches: the model API and, unless its network is `none`, a proxy to other servers.

    Args:
        confinement: That of the agent, with these servers.
        variables: The environment variables that configure the agent's programs.
        proxy: None when the agent reaches other servers directly, or none.
    """

    confinement: Confinement
    variables: Mapping[str, str] = attrs.field(repr=False)
    proxy: EgressProxy | None


def agent_servers(
    confinement: Confinement,
    isolation: Isolation,
    policy: HostPolicy,
    egress: Egress,
    credential_proxy: CredentialProxy,
    ca_file: Path | None,
) -> AgentServers:
    """Return the servers of a task.

    Args:
        ca_file: A file with certificates that the agent can read.
    """
    if confinement.sandbox is None:
        return AgentServers(confinement=confinement, variables=egress.agent_variables(ca_file), proxy=None)
    proxy = EgressProxy(policy, egress) if isolation.network is not AgentNetwork.NONE else None
    servers = {credential_proxy.port: credential_proxy.serve}
    url = None
    if proxy is not None:
        servers[egress_proxy.PORT] = proxy.serve
        url = f"http://127.0.0.1:{egress_proxy.PORT}"
    # All goes through the proxy, which knows what is reached directly.
    shown = attrs.evolve(egress, agent_http_proxy=url, agent_https_proxy=url, no_proxy="")
    variables = {**shown.agent_variables(ca_file), **({} if url is None else {"NODE_USE_ENV_PROXY": "1"})}
    return AgentServers(confinement=attrs.evolve(confinement, servers=servers), variables=variables, proxy=proxy)
