"""Run by the Python of the real gcloud: does it take the calls of the scripts, and would it show what the stand-in shows?

It reads the notes of the stand-in, and reports what differs. It stays off the network: of gcloud only the parser, what makes a
job or a service out of flags, and the printer are used.
"""

# Its imports are of another Python.
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


def made_of(argv, arguments):
    """Return the job or the service that gcloud would make of these flags."""
    if argv[1] == "jobs":
        changes = flags.GetJobConfigurationChanges(arguments, release_track=base.ReleaseTrack.GA)
        made = job.Job.New(client, "namespace")
    else:
        changes = flags.GetServiceConfigurationChanges(arguments, release_track=base.ReleaseTrack.GA)
        made = service.Service.New(client, "namespace")
    made = encoding.MessageToPyValue(config_changes.WithChanges(made, changes).Message())
    made["metadata"]["name"] = argv[2 if argv[1] == "deploy" else 3]
    return made


def shown(arguments, resource):
    """Return what gcloud would print of this resource."""
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


found = []
for call in map(json.loads, sys.stdin):
    argv = call["argv"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            arguments = parser.parse_args(argv)
    except SystemExit:
        found.append({"argv": argv, "fault": said.getvalue()})
        continue
    if "deploy" in argv:
        found.append({"argv": argv, "made": made_of(argv, arguments)})
    elif call["output"] is not None and arguments.format:
        output = shown(arguments, call["resource"])
        if output != call["output"]:
            found.append({"argv": argv, "fault": f"{output!r} is not {call['output']!r}"})
json.dump(found, sys.stdout)
