"""Check calls of the gcloud stand-in with the code of the real gcloud. Runs in the Python of gcloud, without the network.

Reads the log of calls from standard input. Each command line must be valid, and each output must be what gcloud would print for
the same resource. Prints the faults, and the jobs and services that gcloud would create, as JSON.
"""

# The imports are modules of gcloud.
# mypy: ignore-errors

import contextlib
import io
import json
import os
import sys
import types

root = os.environ["GCLOUD_ROOT"]
sys.path[:0] = [f"{root}/lib", f"{root}/lib/third_party"]

from apitools.base.py import encoding  # noqa: E402
from googlecloudsdk import gcloud_main  # noqa: E402
from googlecloudsdk.api_lib.run import job, service  # noqa: E402
from googlecloudsdk.api_lib.util import apis  # noqa: E402
from googlecloudsdk.calliope import base, display_taps  # noqa: E402
from googlecloudsdk.command_lib.run import config_changes, flags  # noqa: E402
from googlecloudsdk.core.resource import resource_lex, resource_printer  # noqa: E402
from googlecloudsdk.core.util import peek_iterable  # noqa: E402

parser = gcloud_main.CreateCLI([])._CLI__parser
client = types.SimpleNamespace(_VERSION="v1", MESSAGES_MODULE=apis.GetMessagesModule("run", "v1"))


def deployed_resource(argv, arguments):
    """Return the job or the service that gcloud would create from these flags."""
    if argv[1] == "jobs":
        changes = flags.GetJobConfigurationChanges(arguments, release_track=base.ReleaseTrack.GA)
        new = job.Job.New(client, "namespace")
    else:
        changes = flags.GetServiceConfigurationChanges(arguments, release_track=base.ReleaseTrack.GA)
        new = service.Service.New(client, "namespace")
    resource = encoding.MessageToPyValue(config_changes.WithChanges(new, changes).Message())
    resource["metadata"]["name"] = argv[2 if argv[1] == "deploy" else 3]
    return resource


def printed(arguments, resource):
    """Return what gcloud would print for this resource."""
    resources = iter(resource if isinstance(resource, list) else [resource])
    for slices in arguments.flatten or ():
        key = []
        for step in resource_lex.Lexer(slices).Key():
            if step is None:
                resources = peek_iterable.Tapper(resources, display_taps.Flattener(key))
            else:
                key.append(step)
    text = io.StringIO()
    resource_printer.Print(resources, arguments.format, out=text)
    return text.getvalue()


reports = []
for call in map(json.loads, sys.stdin):
    argv = call["argv"]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            arguments = parser.parse_args(argv)
    except SystemExit:
        reports.append({"argv": argv, "fault": errors.getvalue()})
        continue
    if "deploy" in argv:
        reports.append({"argv": argv, "resource": deployed_resource(argv, arguments)})
    elif call["output"] is not None and arguments.format:
        output = printed(arguments, call["resource"])
        if output != call["output"]:
            reports.append({"argv": argv, "fault": f"{output!r} is not {call['output']!r}"})
json.dump(reports, sys.stdout)
