"""The parser of commands that read their own words: it refuses in one line, where argparse prints its usage too."""

import argparse
from typing import NoReturn

from configs.refusal import Refused


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaints are refusals; parsers of its subcommands are of this kind too."""

    def error(self, message: str) -> NoReturn:
        """Raise `Refused` with what is wrong."""
        command = self.prog.removeprefix("sollune ")
        raise Refused(f"{command}: {' '.join(message.split())} - {self.prog} --help lists what it takes")
