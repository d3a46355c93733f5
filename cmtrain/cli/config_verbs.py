"""Parse `cmtrain config ...`: show, schema, reference."""

import json
import sys

from cmtrain.cli.arguments import CONFIG_HELP, make_parser, parse_with_config
from cmtrain.config.describe import config_reference, config_schema
from cmtrain.config.schema import to_yaml
from cmtrain.errors import EXIT_DONE, ConfigError

HELP = """\
usage: cmtrain config show --config FILE [--SECTION.KEY VALUE ...]
       cmtrain config schema | reference

show       print the resolved configuration and where each value comes from
schema     print the JSON schema of configuration files, for editors
reference  print every key, its unit, range and default, for people
"""


def config(arguments: list[str]) -> int:
    """Run the verb that `arguments` begin with. Returns the exit code."""
    what = arguments.pop(0) if arguments else ""
    if what in ("-h", "--help"):
        text = HELP
    elif what == "schema" and not arguments:
        text = json.dumps(config_schema(), indent=2) + "\n"
    elif what == "reference" and not arguments:
        text = config_reference()
    elif what == "show":
        about = "Print the resolved configuration and where each value comes from."
        parser = make_parser("config show", about)
        parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
        _, resolved = parse_with_config(parser, arguments)
        text = to_yaml(resolved.config, resolved.origins)
    else:
        verbs = "`config show --config FILE`, `config schema` or `config reference`"
        raise ConfigError(f"cmtrain config: must be {verbs}")
    sys.stdout.write(text)
    return EXIT_DONE
