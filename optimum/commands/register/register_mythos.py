"""Found by Optimum, which looks for files in the namespace package optimum.commands.register: adds `optimum-cli export mythos`."""

from optimum.commands.export.base import ExportCommand

from mythos_export.integrations.optimum_command import MythosExportCommand

REGISTER_COMMANDS = [(MythosExportCommand, ExportCommand)]
