"""The component `train`, whose ranks keep a ledger: torchx run tests/cluster/component.py:train --ledgers DIR ..."""

import torchx.specs as specs

from triptych.launch import component


def train(
    recipe: str, run: str, ledgers: str, set: str = "", nodes: int = 1, ranks: int = 1, memMB: int = 4096, max_retries: int = 0
) -> specs.AppDef:
    """Train a recipe over nodes x ranks processes that write down the rows of each step.

    Args:
        recipe: recipe file
        run: run folder
        ledgers: folder for the ledgers
        set: overrides, key=value, separated by semicolons
        nodes: number of nodes
        ranks: processes a node
        memMB: memory a node, in MB
        max_retries: how often the scheduler may start the job anew
    """
    app = component.train(
        recipe=recipe, run=run, set=set, nodes=nodes, ranks=ranks, memMB=memMB, max_retries=max_retries, env={"LEDGERS": ledgers}
    )
    (role,) = app.roles
    role.args = [arg.replace("-m triptych.launch.train", "-m tests.cluster.rank") for arg in role.args]
    return app
