"""``lit-unlearn completion``: scripts with which a shell completes commands, options and configuration files."""

from __future__ import annotations

import argparse
import contextlib
import io
import re

from lit_unlearn import cli

_OPTION = re.compile(r"(?<![\w-])--\w[\w.-]*")
_CLASSES = {
    "model": ("LitUnlearn", "LitFinetune", "LitEvaluate"),
    "data": ("FictionalAuthors", "ForgetRetain", "TOFU", "MUSE"),
}

_INSTALL = {
    "bash": "lit-unlearn completion bash > ~/.local/share/bash-completion/completions/lit-unlearn",
    "zsh": "lit-unlearn completion zsh > DIRECTORY_IN_FPATH/_lit-unlearn",
    "fish": "lit-unlearn completion fish > ~/.config/fish/completions/lit-unlearn.fish",
}

_BASH = """\
# {install}
_lit_unlearn() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} options= IFS=$'\\n'
    if [[ $cur == "=" ]]; then cur=; elif [[ $prev == "=" ]]; then prev=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if ((COMP_CWORD == 1)); then
        options="{commands}"
    elif [[ $prev == --config || $prev == -c ]]; then
        COMPREPLY=($(compgen -W "{configs}" -- "$cur"; compgen -f -X '!*.yaml' -- "$cur"; compgen -d -- "$cur"))
        return
    elif [[ $cur != -* ]]; then
        COMPREPLY=($(compgen -f -- "$cur"))
        return
    else
        case ${{COMP_WORDS[1]}} in
{options}
        esac
    fi
    COMPREPLY=($(compgen -W "$options" -- "$cur"))
}}
complete -o filenames -F _lit_unlearn lit-unlearn
"""

_ZSH = """\
#compdef lit-unlearn
# {install}
_lit_unlearn() {{
    local -a options
    if ((CURRENT == 2)); then compadd -- {commands}; return; fi
    if [[ $PREFIX == --config=* ]] && compset -P '*=' || [[ $words[CURRENT-1] == (--config|-c) ]]; then
        compadd -- {configs}
        _files -g '*.yaml'
        return
    fi
    case $words[2] in
{options}
    esac
    if [[ $PREFIX == -* && $PREFIX != *=* ]]; then compadd -- $options; else compset -P '*='; _files; fi
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _lit_unlearn "$@"; else compdef _lit_unlearn lit-unlearn; fi
"""

_FISH = """\
# {install}
complete -c lit-unlearn -n __fish_use_subcommand -f -a '{commands}'
complete -c lit-unlearn -s c -l config -x -a '{configs} (__fish_complete_suffix .yaml)'
{options}
"""


def run(arguments: list[str]) -> None:
    """Prints a shell's completion script; what it offers is that of the installed version."""
    parser = argparse.ArgumentParser(prog="lit-unlearn completion", description=run.__doc__)
    parser.add_argument("shell", choices=_INSTALL)
    print(script(parser.parse_args(arguments).shell), end="")


def script(shell: str) -> str:
    """The completion script of ``bash``, ``zsh`` or ``fish``: lists only, so that completing imports nothing."""
    options = {command: options_of(command) for command in cli.COMMANDS}
    configs = sorted({file.relative_to(home).as_posix() for home in cli.CONFIGS for file in home.rglob("*.yaml")})
    template, case, separator = {
        "bash": (_BASH, '            {command}) options="{options}" ;;', "\n"),
        "zsh": (_ZSH, "        {command}) options=({options}) ;;", " "),
        "fish": (_FISH, "complete -c lit-unlearn -n '__fish_seen_subcommand_from {command}' -a '{options}'", " "),
    }[shell]
    cases = [case.format(command=command, options=separator.join(names)) for command, names in options.items()]
    return template.format(
        install=_INSTALL[shell],
        commands=separator.join(cli.COMMANDS),
        configs=separator.join(configs),
        options="\n".join(cases),
    )


def options_of(command: str) -> list[str]:
    """The options that a command's help names, with those of this package's models and data."""
    if command == "completion":  # itself; its help would say the same
        return ["--help"]
    helps = [["--help"]]
    if command in cli.TRAINER:
        helps += [[f"--{what}.help", kind] for what, kinds in _CLASSES.items() for kind in kinds]
    return sorted({option for arguments in helps for option in _OPTION.findall(_help([command, *arguments]))})


def _help(arguments: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main(arguments)
    return printed.getvalue()
