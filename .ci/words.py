# SPDX-License-Identifier: MIT
"""Sokoban in few words, which a small pretrained model learns on two CPU cores.

    python skill_sd.py --env .ci/words.py --model NAME_OR_DIR --max-new-tokens 1 ...

A world on top of sokoban_env.py: one box, no map, and what blocks the way is told afterwards."""
import sokoban_env
from sokoban_env import BLOCKED, MOVES, cells_of, parse_action

RULES = """You push a box onto a goal. Answer with one word, up, down, left or right. To push the \
box, move into it. Examples:
The box is 1 down. Push it 1 down.
Move: down
The box is 1 up and 2 left. Push it 1 left.
Move: up"""


def way(here, there, width):
    """How far it is from one cell to another, as "1 up and 2 left"."""
    down, right = (b - a for a, b in zip(divmod(here, width), divmod(there, width)))
    said = []
    if down:
        said.append(f"{abs(down)} {'down' if down > 0 else 'up'}")
    if right:
        said.append(f"{abs(right)} {'right' if right > 0 else 'left'}")
    return " and ".join(said) or "here"


class Words(sokoban_env.SokobanEnv):
    def observation(self, note=""):
        room = self.state
        (box,), (goal,) = cells_of(room.boxes), cells_of(room.goals)
        blocked = "Blocked. " if note == BLOCKED else ""
        return (f"{blocked}The box is {way(room.player, box, room.width)}. "
                f"Push it {way(box, goal, room.width)}.")


def analyse(messages):
    """The rule-based analyst: the moves of the attempt, and whether they solved it."""
    moves = [parse_action(m["content"]) for m in messages if m["role"] == "assistant"]
    solved = messages[-1]["content"].endswith("Push it here.")
    return dict(success_analysis="the task was solved" if solved else "",
                mistake_analysis="" if solved else "the task was not solved",
                golden_workflow=", ".join(MOVES[move] for move in moves if move is not None))


def make_world(cfg):
    world = sokoban_env.make_world(cfg)
    levels = {level.task_id: level for level in world.levels}
    world.make_env = lambda x: Words(levels[x], cfg.max_turns, RULES, "Move:")
    world.analyse = analyse
    return world
