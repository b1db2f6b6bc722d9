# SPDX-License-Identifier: MIT
"""Sokoban for language-model agents: rules, levels, solver, text, the analyst, a small player.

The world needs the standard library only; torch and transformers are imported where the player, a
tiny language model, is made. An agent reads the room with one glyph per cell, then in sentences,
and answers with one move. Levels are read and written as XSB text:

    #  wall     _ or - or space  floor     .  goal
    $  box      *  box on a goal           @  player     +  player on a goal

Cells are named by column letter and row number, counted from the top-left corner, a1. A state of a
room is (player, boxes): a cell, row * width + column, and a bit mask of cells.

    python sokoban_env.py                    play generated levels in the terminal
    python sokoban_env.py --file my.xsb      play the levels of a file
"""
import argparse
import hashlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import random
import re
import runpy
import shutil
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

try:
    import fcntl
except ImportError:                          # Windows: two runs in one folder are not told
    fcntl = None

MOVES = ("up", "down", "left", "right")      # the order of every table below
LETTERS = "UDLR"


class UserError(ValueError):
    """A mistake that the user can mend: a program tells it in one line, without a traceback."""
    told = True


def require(right, told):
    """UserError with what is told unless something is right."""
    if not right:
        raise UserError(told)


# ---- Levels --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Level:
    """One level."""
    width: int
    height: int
    walls: int                               # a bit mask; cells outside the walls count as wall
    goals: int
    boxes: int
    player: int
    moves: int | None = field(default=None, compare=False)     # optimal length, where known

    @property
    def task_id(self):
        """A name that is the same in every process: a digest of the XSB text."""
        return "sokoban-" + hashlib.sha256(to_xsb(self).encode()).hexdigest()[:12]

    @property
    def steps(self):
        """What each of MOVES adds to a cell index."""
        return (-self.width, self.width, -1, 1)

    def after(self, move):
        """The level after one of MOVES (an index), or itself when a wall or a box is in the way."""
        state = push(self, self.player, self.boxes, self.steps[move])
        return self if state is None else replace(self, player=state[0], boxes=state[1], moves=None)

    def completion(self):
        """Boxes on goals / boxes."""
        return (self.boxes & self.goals).bit_count() / self.boxes.bit_count()

    def cell_name(self, cell):
        return f"{chr(ord('a') + cell % self.width)}{cell // self.width + 1}"


def push(level, player, boxes, step):
    """(player, boxes) after moving by `step`, pushing at most one box; None if that is blocked."""
    cell = player + step
    if level.walls >> cell & 1:
        return None
    if boxes >> cell & 1:
        beyond = cell + step
        if (level.walls | boxes) >> beyond & 1:
            return None
        boxes ^= 1 << cell | 1 << beyond
    return cell, boxes


def cells_of(mask):
    """The cells of a bit mask, in order."""
    return [cell for cell in range(mask.bit_length()) if mask >> cell & 1]


def glyph_rows(level, floor):
    on_goal = {"$": "*", "@": "+", floor: "."}
    rows = []
    for row in range(level.height):
        line = ""
        for cell in range(row * level.width, (row + 1) * level.width):
            glyph = ("#" if level.walls >> cell & 1 else "$" if level.boxes >> cell & 1
                     else "@" if cell == level.player else floor)
            line += on_goal.get(glyph, glyph) if level.goals >> cell & 1 else glyph
        rows.append(line)
    return rows


def to_xsb(level):
    """The level as XSB text. What lies outside the walls is written as wall."""
    return "\n".join(glyph_rows(level, " "))


def render(level):
    """The room as the agent sees it: one glyph per cell, parted by blanks, `_` for the floor."""
    return "\n".join(" ".join(row) for row in glyph_rows(level, "_"))


def describe(level, player, boxes):
    """A state of the room in relations, in short sentences: where the boxes lie seen from the
    player, the goals seen from the boxes, and on which sides either is blocked."""
    name = level.cell_name

    def sides(cell, taken):
        return " ".join(move for move, step in zip(MOVES, level.steps)
                        if taken >> cell + step & 1) or "none"

    def way(here, there):
        down, right = (b - a for a, b in zip(divmod(here, level.width), divmod(there, level.width)))
        return (f"{abs(down)} {'down' if down > 0 else 'up'}, "
                f"{abs(right)} {'right' if right > 0 else 'left'}")
    said = [f"You are at {name(player)} (walls: {sides(player, level.walls)})."]
    for box in cells_of(boxes):
        said.append(f"The box {name(box)} is {way(player, box)} of you "
                    f"(blocked: {sides(box, level.walls | boxes)}).")
        said += [f"To the goal {name(goal)} push {way(box, goal)}."
                 for goal in cells_of(level.goals)]
    return " ".join(said)


def parse_level(xsb_text):
    """Read XSB text, or the room text that the agent sees. ValueError with line and column."""
    lines = [line.rstrip() for line in xsb_text.split("\n")]
    first = next((i for i, line in enumerate(lines) if line), len(lines))
    while lines and not lines[-1]:
        lines.pop()
    rows = lines[first:]
    if all(re.fullmatch(r"\S( \S)*", row) for row in rows):     # room text: blanks between glyphs
        rows, column = [row[::2] for row in rows], lambda c: 2 * c + 1
    else:
        column = lambda c: c + 1
    if not rows:
        raise ValueError("level is empty: expected XSB text, lines of '#', ' ', '.', '$', '*', "
                         "'@', '+'")
    width, height = max(map(len, rows)), len(rows)
    if width > 26 or height > 99:                  # a column's name is one letter
        raise ValueError(f"level of {width} columns and {height} rows in lines {first + 1}-"
                         f"{first + height} (column 1 on): at most 26 columns and 99 rows")
    masks = dict.fromkeys("wgbp", 0)
    players = []
    for r, row in enumerate(rows):
        for c, glyph in enumerate(row):
            if glyph not in "# -_.$*@+":
                raise ValueError(f"line {first + r + 1}, column {column(c)}: unknown glyph "
                                 f"{glyph!r}; allowed are '#', ' ', '-', '_', '.', '$', "
                                 "'*', '@', '+'")
            bit = 1 << r * width + c
            masks["w"] |= bit * (glyph == "#")
            masks["g"] |= bit * (glyph in ".*+")
            masks["b"] |= bit * (glyph in "$*")
            if glyph in "@+":
                players.append((r, c))
                if len(players) > 1:
                    raise ValueError(f"line {first + r + 1}, column {column(c)}: a second player; "
                                     "a level has exactly one '@' or '+'")
    if not players:
        raise ValueError(f"no player in lines {first + 1}-{first + height} (column 1 on): "
                         "a level has exactly one '@' or '+'")
    boxes, goals = masks["b"].bit_count(), masks["g"].bit_count()
    if not boxes or boxes != goals:
        raise ValueError(f"{boxes} boxes and {goals} goals in lines {first + 1}-{first + height} "
                         "(column 1 on): a level has at least one box and as many goals")
    player = players[0][0] * width + players[0][1]
    inside = 0
    for start in [player, *cells_of(masks["b"] | masks["g"])]:         # closed-off rooms are legal
        if inside >> start & 1:
            continue
        region = flood(start, masks["w"], width, height)
        if region is None:
            r, c = divmod(start, width)
            raise ValueError(f"line {first + r + 1}, column {column(c)}: {rows[r][c]!r} is outside "
                             "the walls: every way from it to the edge must be closed by '#'")
        inside |= region
    outside = (1 << width * height) - 1 & ~inside
    return Level(width, height, outside, masks["g"], masks["b"], player)


def read_levels(path):
    """The levels of a text file: runs of lines that begin with floor and a wall, whatever stands
    around them. ValueError with the number of the level and the file's own line."""
    raw, levels = Path(path).read_bytes(), []
    text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace")
    lines, start, number = [*re.split(r"\r\n?|\n", text.expandtabs()), ""], 0, 0
    for i, line in enumerate(lines):
        if not re.match(r"[ _-]*#", line):
            if i - start > 2:                  # fewer make no room: a heading, say
                number += 1
                try:
                    levels.append(parse_level("\n" * start + "\n".join(lines[start:i])))
                except ValueError as error:
                    told = f"{path}, level {number}: {error}"
                    if "at most 26 columns" not in told:
                        raise ValueError(told) from None
                    print(f"left out: {told}")
            start = i + 1
    if not levels:
        raise ValueError(f"{path}: no level, that is lines that begin with '#', in it")
    return levels


def flood(start, walls, width, height):
    """Bit mask of the cells reached from `start` without crossing walls; None if the edge is."""
    seen, todo = 1 << start, [start]
    while todo:
        cell = todo.pop()
        r, c = divmod(cell, width)
        if r in (0, height - 1) or c in (0, width - 1):
            return None
        for step in (-width, width, -1, 1):
            bit = 1 << cell + step
            if not (walls | seen) & bit:
                seen |= bit
                todo.append(cell + step)
    return seen


def canonical(level):
    """The least text among the level's eight rotations and reflections, the same for all eight."""
    rows, best = glyph_rows(level, " "), None
    for _ in range(4):
        rows = ["".join(column) for column in zip(*rows[::-1])]            # a quarter turn
        for text in ("\n".join(rows), "\n".join(row[::-1] for row in rows)):
            best = text if best is None or text < best else best
    return best


# ---- Solver --------------------------------------------------------------------------------------
def live_squares(level):
    """Bit mask of the cells from which a lone box can be pushed to some goal: pulled from it."""
    live, todo = level.goals, cells_of(level.goals)
    while todo:
        box = todo.pop()
        for step in level.steps:
            before, player = box - step, box - 2 * step       # the push that brought the box here
            if not level.walls >> before & 1 and not level.walls >> player & 1:
                if not live >> before & 1:
                    live |= 1 << before
                    todo.append(before)
    return live


def solve(level, state_limit=2_000_000):
    """A shortest solution as a string of "UDLR", or None when there is none. Breadth-first over
    (player, boxes), skipping pushes onto squares that no goal can be reached from. RuntimeError
    once more than `state_limit` states are kept (about 200 bytes each)."""
    dead = ~live_squares(level)
    start = (level.player, level.boxes)
    if level.boxes == level.goals:
        return ""
    came_from, queue = {start: None}, deque([start])
    while queue:
        state = queue.popleft()
        for letter, step in zip(LETTERS, level.steps):
            after = push(level, *state, step)
            if after is None or after in came_from or after[1] != state[1] and after[1] & dead:
                continue
            came_from[after] = (state, letter)
            if after[1] == level.goals:
                path = []
                while came_from[after]:
                    after, letter = came_from[after]
                    path.append(letter)
                return "".join(reversed(path))
            queue.append(after)
        if len(came_from) > state_limit:
            raise RuntimeError(f"state_limit={state_limit} reached before a solution was found; "
                               "raise it (about 200 bytes a state) or take a smaller level")
    return None


def distances(level, max_moves=None, state_limit=2_000_000):
    """{(player, boxes): fewest moves to the goal}, up to `max_moves`, for every solvable state of
    this room, whatever the level's own: a search backwards (pushes pulled) from the solved ones."""
    walls, found = level.walls, {}
    frontier = [(cell, level.goals) for cell in range(level.width * level.height)
                if not (walls | level.goals) >> cell & 1]
    steps, depth = level.steps, 0
    while frontier and (max_moves is None or depth <= max_moves):
        found.update(dict.fromkeys(frontier, depth))
        before = {}                                            # a dict: a set with a fixed order
        for player, boxes in frontier:
            blocked = walls | boxes
            for step in steps:
                origin = player - step
                if blocked >> origin & 1:
                    continue
                if (origin, boxes) not in found:
                    before[origin, boxes] = None
                if boxes >> player + step & 1:                 # that move may have been a push
                    pulled = boxes ^ (1 << player + step | 1 << player)
                    if (origin, pulled) not in found:
                        before[origin, pulled] = None
        if len(found) > state_limit:
            raise UserError(f"state_limit={state_limit} reached: this room has too many states; "
                            "use a smaller size, fewer boxes or a smaller max_moves")
        frontier, depth = list(before), depth + 1
    return found


def best_moves(level, player, boxes, table):
    """Indices into MOVES of the moves that start a shortest solution; empty in a lost state."""
    here = table.get((player, boxes))
    if not here:
        return []
    return [m for m, step in enumerate(level.steps)
            if table.get(push(level, player, boxes, step)) == here - 1]


# ---- Generator -----------------------------------------------------------------------------------
def below(rng, n):
    """A whole number in [0, n). Only random() is promised to be the same in every Python."""
    return int(rng.random() * n)


def random_room(rng, size, boxes):
    """A square room with random inner walls and goals, its floor in one piece; None on a miss."""
    inner = [r * size + c for r in range(1, size - 1) for c in range(1, size - 1)]
    walls = (1 << size * size) - 1 & ~sum(1 << cell for cell in inner)
    for _ in range(below(rng, len(inner) // 3 + 1)):
        walls |= 1 << inner[below(rng, len(inner))]
    floor = [cell for cell in inner if not walls >> cell & 1]
    if len(floor) < 2 * boxes + 1 or flood(floor[0], walls, size, size).bit_count() != len(floor):
        return None
    goals = 0
    while goals.bit_count() < boxes:
        goals |= 1 << floor[below(rng, len(floor))]
    return Level(size, size, walls, goals, goals, floor[0])


def generate_levels(n, seed, size=6, boxes=2, min_moves=1, max_moves=20, exclude=()):
    """n solvable levels, distinct up to rotation and reflection also from those of `exclude`: of
    random rooms the states at one distance, drawn from [min_moves, max_moves], with no box on a
    goal. Equal arguments give equal lists on every machine."""
    if not 4 <= size <= 26 or boxes < 1 or 2 * boxes + 1 > (size - 2) ** 2:
        raise UserError(f"size={size}, boxes={boxes}: a room of that size (4 to 26, walls "
                        "included) must hold the player, the boxes and as many free goals")
    if not 1 <= min_moves <= max_moves:
        raise UserError(f"min_moves={min_moves}, max_moves={max_moves}: "
                        "1 <= min_moves <= max_moves")
    rng, levels, misses = random.Random(seed), [], 0
    seen = {canonical(level) for level in exclude}
    while len(levels) < n:
        misses += 1
        if misses > 2000:
            raise UserError(f"no further level with size={size}, boxes={boxes}, "
                            f"min_moves={min_moves}, max_moves={max_moves} in 2000 rooms "
                            f"(have {len(levels)} of n={n}): "
                            "widen the range of moves, enlarge the room or ask for fewer")
        room = random_room(rng, size, boxes)
        if room is None:
            continue
        wanted = min_moves + below(rng, max_moves - min_moves + 1)
        starts = [state for state, moves in distances(room, wanted).items()
                  if moves == wanted and not state[1] & room.goals]
        if not starts:
            continue
        player, start_boxes = starts[below(rng, len(starts))]
        level = replace(room, player=player, boxes=start_boxes, moves=wanted)
        key = canonical(level)
        if key not in seen:
            seen.add(key)
            levels.append(level)
            misses = 0
    return levels


def derived_seed(*parts):
    """A 63-bit seed from whole numbers and words; the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# ---- Environment ---------------------------------------------------------------------------------
@dataclass
class Settings:
    """The settings of this world, and of its small player."""
    size: int = 6                    # room size, walls included, as in the paper
    boxes: int = 1                   # boxes per room; the paper has 2
    min_moves: int = 3               # shortest optimal solution                        CHOICE
    max_moves: int = 8               # longest optimal solution                         CHOICE
    max_turns: int = 12              # answers per episode, here moves; the paper allows 40
    train_levels: int = 256          # training levels; the paper has 96
    test_levels: int = 2048          # held-out levels; the paper uses 64
    split: Literal["test", "val"] = "test"            # held-out levels; val while tuning
    timid: float = 0.65              # share of moves away from boxes in the play that `tiny` clones
    warm_demos: int = 36000          # games that the built-in model's warm start learns from

    may_be_0 = ("seed",)             # of the whole numbers; the others are at least 1

    def check(self, name, right, remedy):
        require(right, f"{name}={getattr(self, name)!r}: {remedy}")

    def __post_init__(self):
        """UserError unless each field has its type, is one of its choices, and finite."""
        for f in fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            accepted = {int: int, float: (int, float), str: (str, Path)}[kind]
            choices = get_args(f.type) or [value]
            self.check(f.name, isinstance(value, accepted), f"must be of type {kind.__name__}")
            self.check(f.name, value in choices, f"must be one of {choices}")
            if kind is not str and not get_args(f.type) and value != f.default:
                least = int(kind is int and f.name not in self.may_be_0)
                self.check(f.name, least <= value < 2**31, f"must be >= {least}, below 2**31")
            setattr(self, f.name, kind(value))                 # a Path becomes a str

    @classmethod
    def parse_args(cls, argv=None):
        """What was typed, as a dict. The comments of the settings are their help texts."""
        parser = argparse.ArgumentParser()
        source = "".join(map(inspect.getsource, cls.__mro__[:-1]))
        for f in fields(cls):
            comment = re.search(rf"^    {f.name}: .*?  # (.*?)(  +[A-Z]+)?$", source, re.M)[1]
            parser.add_argument(
                "--" + f.name.replace("_", "-"), type=type(f.default), default=argparse.SUPPRESS,
                choices=get_args(f.type) or None, help=f"{comment} (default: {f.default!r})")
        return vars(parser.parse_args(argv))


SYSTEM_PROMPT = """You are playing Sokoban. Push every box onto a goal.

The room is shown with one symbol per cell:
# wall   _ floor   . goal   $ box   * box on a goal   @ you   + you on a goal
Cells have names: a letter for the column (a is the leftmost) and a number for the row (1 is the \
top). Under the room stands where each box lies seen from you, how far it has to be pushed to each \
goal, and on which sides you meet a wall and it a wall or another box.

Each answer is one move: up, down, left or right. Moving into a box pushes it one cell, if the \
cell behind it is free. Boxes cannot be pulled, and only one box can be pushed at a time: a box \
pushed into a corner that is not a goal is lost.

Think briefly if you need to, and end your answer with the move in tags. Two examples:

# # # # #
# @ $ . #
# # # # #
You are at b2 (walls: up down left). The box c2 is 0 up, 1 right of you (blocked: up down). \
To the goal d2 push 0 up, 1 right.
<answer>right</answer>

# # # # #
# _ @ _ #
# _ $ _ #
# _ . _ #
# # # # #
You are at c2 (walls: up). The box c3 is 1 down, 0 left of you (blocked: none). \
To the goal c4 push 1 down, 0 left.
<answer>down</answer>"""
NO_MOVE = "No move was read. End your answer with <answer>up</answer>, or down, left, right."
BLOCKED = "That way is blocked."


@lru_cache(1000)
def parse_action(text):
    """Index into MOVES, read tolerantly from a model's text; None when there is no move in it.
    The last <answer>...</answer> decides, or a tag that was not closed with its first line: by its
    first move if it holds nothing but moves, else by its last. Without a tag, the last of the four
    direction words decides. In any case."""
    text = text.lower()
    closed = [part.partition("<answer>") for part in text.split("</answer>")[:-1]]
    tagged = [inside for _, opened, inside in closed if opened]
    if not tagged and "<answer>" in text:
        unclosed = text.strip().removesuffix("<answer>").split("<answer>")
        firsts = [re.split(r"[\n<\[]|/answer>", part.strip())[0] for part in unclosed]
        # A closing tag may have a slip, so that a second opening one ends a move.
        tagged = [first for first in firsts[1:] if first.strip() in MOVES][-1:] or firsts[-1:]
    said = tagged[-1] if tagged else text
    words = re.findall(r"(?<![a-z])(up|down|left|right)(?![a-z])", said)
    filler = ("up|down|left|right|then|and|push|move|go|first|next|step|the|box|to|it|once|twice|"
              "times|cells?|[a-z]\\d+")
    several = tagged and re.fullmatch(rf"(?:\b(?:{filler})\b|[\W\d_])*", said)
    return MOVES.index(words[0 if several else -1]) if words else None


@lru_cache(2**16)                            # rollouts of one task meet the same states
def shown(room):
    return f"{render(room)}\n{describe(room, room.player, room.boxes)}"


class SokobanEnv:
    """One level as a conversation: `reset`, then `step` with the model's text until done."""

    def __init__(self, level, max_turns=40, system_prompt=SYSTEM_PROMPT, prefill=""):
        self.level, self.max_turns, self.task_id = level, max_turns, level.task_id
        self.system_prompt, self.prefill = system_prompt, prefill

    def reset(self):
        """Start over. Returns the first observation (str)."""
        self.state, self.turn = self.level, 0
        self.counts = {"no_action": 0, "blocked": 0}
        return self.observation()

    def observation(self, note=""):
        return f"{note}\n{shown(self.state)}".strip()

    def step(self, response):
        """One turn: the model's text in, (observation, done) out. An unreadable text costs one."""
        self.turn += 1
        move, note = parse_action(response), ""
        if move is None:
            self.counts["no_action"] += 1
            note = NO_MOVE
        else:
            after = self.state.after(move)
            if after is self.state:
                self.counts["blocked"] += 1
                note = BLOCKED
            self.state = after
        return self.observation(note), self.completion() == 1.0 or self.turn >= self.max_turns

    def completion(self):
        """Boxes on goals / boxes, in [0, 1]; 1.0 is success."""
        return self.state.completion()

    def close(self):
        """Nothing to give back: the world lives in this object."""


def make_world(cfg):
    """A world: the ids of its tasks, train and heldout, make_env(id), an analyst
    for summarizer="rules", and the levels that a warm start keeps away from. Training, validation
    and test levels (cfg.split says which are held out) are disjoint up to rotation and
    reflection. cfg.seed changes the training levels only."""
    if not 0 <= cfg.timid <= 1:
        raise UserError(f"timid={cfg.timid}: a share, from 0 to 1")
    sets, levels = {}, []
    for name, n, seed in (("test", cfg.test_levels, 0), ("val", cfg.test_levels, 0),
                          ("train", cfg.train_levels, cfg.seed)):
        sets[name] = generate_levels(n, derived_seed(name, seed), cfg.size, cfg.boxes,
                                     cfg.min_moves, cfg.max_moves, exclude=levels)
        levels = levels + sets[name]
    by_id = {level.task_id: level for level in levels}
    train = sorted(sets["train"], key=lambda level: level.moves)
    rules = "" if is_player(cfg.model) else SYSTEM_PROMPT      # it does not read English
    no_room_to_think = rules and cfg.max_new_tokens <= 16
    prefill = "<answer>" if no_room_to_think else ""                               # CHOICE

    def make_env(task_id):
        return SokobanEnv(by_id[task_id], cfg.max_turns, rules, prefill)
    return SimpleNamespace(
        train=[level.task_id for level in train], levels=levels, make_env=make_env,
        analyse=analyse, heldout=[level.task_id for level in sets[cfg.split]])


# ---- What a world must offer, this one or another ------------------------------------------------
def world_file(env):
    """The file of a world, whose `env` is a module's name or a path to FILE.py; None if there is
    none."""
    if env.endswith(".py"):
        return env if os.path.isfile(env) else None
    try:
        path = importlib.util.find_spec(env).origin
    except (ImportError, AttributeError, ValueError):
        return None
    return path if path and path.endswith(".py") else None


def load_world(cfg, least_heldout=1):
    """What make_world(cfg) of the world cfg.env returns. UserError, before any minute is spent,
    where it is not as the README's table "A world of your own" says."""
    def need(thing, names, what):
        for name in names.split():
            require(hasattr(thing, name), f"env={cfg.env!r}: {what} has no `{name}`")
    if cfg.env.endswith(".py"):
        folder = str(Path(cfg.env).absolute().parent)
        sys.path.insert(0, folder)             # for what it imports
        try:
            found = called(f"env={cfg.env!r}:", runpy.run_path, cfg.env, None, Path(cfg.env).stem)
            module = SimpleNamespace(**found)
        finally:
            sys.path.remove(folder)
    else:
        module = called(f"env={cfg.env!r}:", importlib.import_module, cfg.env)
    need(module, "make_world", "the module")
    made = called(f"env={cfg.env!r}: make_world:", module.make_world, cfg)
    need(made, "train heldout make_env", "what make_world returns")

    def make_env(x):
        return called(f"env={cfg.env!r}: make_env({x!r}):", made.make_env, x)

    def analyse(messages):
        return called(f"env={cfg.env!r}: analyse:", made.analyse, messages)
    world = SimpleNamespace(train=made.train, heldout=made.heldout, make_env=make_env,
                            analyse=analyse, levels=getattr(made, "levels", []))
    rules = cfg.summarizer == "rules" and cfg.skill_reader != "nobody"
    require(not rules or hasattr(made, "analyse"), f"env={cfg.env!r}: the world has no `analyse` "
            "for summarizer='rules': write one, or give --summarizer self")
    for name, least in ("train", cfg.tasks_per_iteration), ("heldout", least_heldout):
        ids = getattr(world, name)
        require(isinstance(ids, list) and all(isinstance(x, str) for x in ids),
                f"env={cfg.env!r}: world.{name}={ids!r:.99}: must be a list of str")
        require(len(ids) >= least and len({*ids}) == len(ids),
                f"env={cfg.env!r}: len(world.{name})={len(ids)}, {len({*ids})} of them different: "
                f"must be all, and at least {least}" + " (tasks_per_iteration)" * (name == "train"))
    prefills = set()
    for x in world.train[0], world.heldout[0]:
        told = f"env={cfg.env!r}: make_env({x!r})"
        env, twin = world.make_env(x), world.make_env(x)
        need(env, "task_id system_prompt reset step completion close", "what make_env returns")
        require(env.task_id == x, f"{told}.task_id is {env.task_id!r}: must be that of the task")
        require(env is not twin, f"{told} returned one object twice: must be a new one each time")
        prefills |= {getattr(env, "prefill", ""), getattr(twin, "prefill", "")}
        require(isinstance(env.system_prompt, str) and env.system_prompt == twin.system_prompt,
                f"{told}.system_prompt={env.system_prompt!r:.99}: must be a str, always the same")
        require(len(prefills) == 1 and isinstance([*prefills][0], str),
                f"{told}.prefill: {prefills}: must be one str for all environments")
        text, other = ask(env, "reset"), ask(twin, "reset")
        require(text == other, f"{told}: two of them begin with {text!r:.60} and {other!r:.60}: a "
                "task must always begin in the same way")
        require(not is_player(cfg.model) or share_read(text, cfg.size) > 0.4,
                f"model={cfg.model!r}: the small player reads words of Sokoban only, not "
                f"{text!r:.60}; give a chat model, --model NAME_OR_DIR")
        observation, _ = ask(env, "step", "", turn=1)          # an answer may be empty
        ask(env, "completion", turn=1)
        ask(env, "close")
        ask(twin, "close")
        if rules:
            skill = world.analyse([
                {"role": "user", "content": text}, {"role": "assistant", "content": ""},
                {"role": "user", "content": observation}])
            require(isinstance(skill, dict) and all(
                isinstance(skill.get(name), str) for name in SILENT),
                f"env={cfg.env!r}: analyse returned {skill!r:.99}: must be a dict of the str "
                f"{', '.join(SILENT)}")
    return world


def called(place, call, *given):
    """call(*given). An error of the world's own keeps its traceback, and tells the place; one that
    is `told` is told as it is."""
    try:
        return call(*given)
    except Exception as error:
        if getattr(error, "told", False):
            raise
        raise RuntimeError(f"{place} {type(error).__name__}: {error}") from error


def ask(env, name, *given, turn=0):
    """env.name(*given), checked."""
    place = f"{type(env).__name__}.{name}, task {env.task_id!r}, turn {turn}:"
    answer = called(place, getattr(env, name), *given)
    if name == "reset":
        require(isinstance(answer, str), f"{place} returned {answer!r:.99}: must be a str "
                "(gymnasium's is a pair, observation and info)")
    if name == "step":
        is_pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str)
        require(is_pair and type(answer[1]).__name__ in ("bool", "bool_"),
                f"{place} returned {answer!r:.99}, not a pair of a str and a bool (gymnasium "
                "returns five)")
    if name == "completion":
        number = isinstance(answer, numbers.Real)
        require(number and (0 <= answer <= 1 or math.isnan(answer)),
                f"{place} returned {answer!r}, not a number from 0 to 1, or nan if it was lost")
        answer = round(float(answer), 9)       # ten times 0.1 must be 1
    return answer


def not_lost(episodes, max_context):
    """The episodes that have a reward; UserError if none has. Warns if most were cut short."""
    batch = [t for t in episodes if not math.isnan(t.reward)]
    require(batch, f"process {os.environ.get('RANK', 0)} lost every episode, the first with "
            f"{episodes[0].counts}; its prompt has {len(episodes[0].prompt)} tokens, "
            f"{max_context=}: raise it?")
    full = sum(t.counts["truncated"] for t in batch)
    if full > len(batch) / 2:
        print(f"warning: {full} of {len(batch)} episodes were cut short by {max_context=}")
    return batch


# ---- The analyst, and demonstrations to learn from -----------------------------------------------
def room_in(observation):
    """The room drawn in an observation, as a Level."""
    return parse_level("\n".join(line for line in observation.split("\n") if line.startswith("#")))


def analyse(messages):
    """The rule-based analyst, where the agent is too small to write: the three fields of a skill.
    It reads ONE finished conversation, [{"role", "content"}, ...], which ends with an observation,
    and knows the rules, but never calls the solver."""
    rooms = [room_in(m["content"]) for m in messages if m["role"] == "user"]
    moves = [parse_action(m["content"]) for m in messages if m["role"] == "assistant"]
    return write_notes(rooms[0], [(room.player, room.boxes) for room in rooms], moves)


def needed(level, box, goal):
    """The directions in which a box has to be pushed to a goal: at most two of MOVES."""
    down, right = (b - a for a, b in zip(divmod(box, level.width), divmod(goal, level.width)))
    return (["down" if down > 0 else "up"] * bool(down)
            + ["right" if right > 0 else "left"] * bool(right))


def write_notes(level, states, moves):
    """The analyst's three fields about a game of this level, without any solver. states: (player,
    boxes) before and after every turn; moves: indices into MOVES. The workflow names the pushes up
    to the first best completion, and where boxes then were to go."""
    name, total, live = level.cell_name, level.goals.bit_count(), live_squares(level)
    turns = list(zip(states, moves, states[1:]))
    stuck = next((turn for turn, (before, _, after) in enumerate(turns)      # a box that no goal
                  if after[1] & ~before[1] & ~live), len(turns))             # can be reached from
    done = [(boxes & level.goals).bit_count() for _, boxes in states[:stuck + 1]]
    end = done.index(max(done))
    mistake = "none seen" if done[end] == total else "kept away from boxes"
    if stuck < len(turns):
        (player, before), move, (_, after) = turns[stuck]
        mistake = (f"at {name(player)} {MOVES[move]} pushed a box to "
                   f"{name(cells_of(after & ~before)[0])} where it is stuck")
    workflow = [f"at {name(player)} push {MOVES[move]}" for (player, before), move, (_, after)
                in turns[:end] if before != after]
    for box in cells_of(states[end][1] & ~level.goals):
        ways = [needed(level, box, goal) for goal in cells_of(level.goals & ~states[end][1])]
        workflow += [f"push {way}" for way in min(ways, key=len)]
    return {"success_analysis": f"{done[end]} of {total} boxes on goals in {end} moves",
            "mistake_analysis": mistake, "golden_workflow": ", ".join(workflow) or "nothing to do"}


def fits(level, boxes, told):
    """Whether notes that tell of pushes in these directions say how each box comes to a goal."""
    free = cells_of(level.goals & ~boxes)
    return all(any(told.issuperset(needed(level, box, goal)) for goal in free)
               for box in cells_of(boxes & ~level.goals))


def timid_moves(level, player, boxes):
    """Indices into MOVES of a timid player's moves: no push, and as far from boxes as can be."""
    def far(a, b):
        return abs(a // level.width - b // level.width) + abs(a % level.width - b % level.width)
    score = {}
    for m, step in enumerate(level.steps):
        after = push(level, player, boxes, step)
        if after is not None and after[1] == boxes:
            score[m] = min(far(after[0], box) for box in cells_of(boxes))
    return [m for m in score if score[m] == max(score.values())] or list(range(4))


def move_probs(level, player, boxes, table, timid):
    """How a player who knows the game but is shy of boxes moves: a probability for each of MOVES.
    `timid` is the share of timid moves, the rest are best moves; one move in twenty is a slip.
    Where nothing can be saved any more all moves are timid."""
    best, shy = best_moves(level, player, boxes, table), timid_moves(level, player, boxes)
    timid = timid if best else 1.0
    return [0.05 / 4 + 0.95 * ((1 - timid) * (m in best) / max(len(best), 1)
                               + timid * (m in shy) / len(shy)) for m in range(4)]


def play_as(level, table, rng, timid, turns, notes=None):
    """One game of the player of `move_probs`: (states, moves, probs), the last state included.
    Where the notes fit, he is not timid."""
    told = set(re.findall(r"push (\w+)", notes["golden_workflow"])) if notes else ()
    states, moves, probs = [(level.player, level.boxes)], [], []
    while len(moves) < turns and states[-1][1] != level.goals:
        player, boxes = states[-1]
        bold = told and fits(level, boxes, told)
        p = move_probs(level, player, boxes, table, 0.0 if bold else timid)
        moves.append(rng.choices(range(4), p)[0])
        states.append(push(level, player, boxes, level.steps[moves[-1]]) or states[-1])
        probs.append(p)
    return states, moves, probs


def demonstrate(level, table, rng, timid, turns, noted, other):
    """One game: (level, states, moves, probs, notes), see `play_as`. With the chance `noted` the
    player has notes: the analyst's on an earlier game of this level, the notes `other`, or none."""
    notes = None
    if rng.random() < noted:
        earlier = play_as(level, table, rng, timid * rng.random(), turns)
        own = write_notes(level, *earlier[:2])
        notes = rng.choices([own, other, SILENT], WARM["own_other_empty"])[0]
    return (level, *play_as(level, table, rng, timid, turns, notes), notes)


def demonstrations(n, seed, size=6, boxes=2, max_moves=20, max_turns=40, exclude=(), timid=0.65,
                   noted=0.75, per_room=8):
    """n games (see `demonstrate`) to warm-start a model on, in rooms that no level of `exclude`
    has. UserError if there is no such room."""
    def empty(room):
        return canonical(replace(room, boxes=0, player=-1))
    rng, games, taken, misses = random.Random(seed), [], {empty(level) for level in exclude}, 0
    other = SILENT
    while len(games) < n:
        room = random_room(rng, size, boxes)
        misses += 1
        if misses > 2000:
            raise UserError(f"size={size}, boxes={boxes}: in 2000 rooms none is left for "
                            "demonstrations; enlarge the room or use fewer levels")
        if room is None or empty(room) in taken:
            continue
        misses, table = 0, distances(room)
        starts = [state for state, moves in table.items()
                  if moves <= max_moves and not state[1] & room.goals]
        for _ in range(min(per_room, len(starts), n - len(games))):
            player, start_boxes = starts[below(rng, len(starts))]
            level = replace(room, player=player, boxes=start_boxes)
            games.append(demonstrate(level, table, rng, timid, max_turns, noted, other))
        other = next((game[4] for game in reversed(games[-per_room:]) if game[4]), other)
    return games


# ---- The player of the demo: a tiny language model -----------------------------------------------
SILENT = dict(success_analysis="", mistake_analysis="", golden_workflow="")
PLAYER_VERSION = 3               # to be raised with every change that a warm start depends on
# Chosen on validation levels: games per step, peak learning rate, share of games with notes, and of
# these how many of his own level, of another, or empty.
WARM = dict(batch=32, lr=4e-3, noted=0.9, own_other_empty=(3, 2, 5))

TINY_TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
                 "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>{% endif %}"
                 "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def is_player(model):
    """Whether `model` is "tiny", or the folder of a student that was trained from it."""
    template = Path(model) / "chat_template.jinja"
    return model == "tiny" or template.exists() and template.read_text() == TINY_TEMPLATE


@contextmanager
def threads_for(model):
    """For the small player, torch runs on one thread here unless OMP_NUM_THREADS says otherwise: on
    tensors of this size threads only wait for each other, and beside another process for long."""
    import torch
    before = torch.get_num_threads()
    if is_player(model) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tiny_tokenizer(size):
    """A tokenizer for the demo's texts. It reads what a room is in relations, each of them one
    word, and of other words a few; all the rest, as the map, it does not see."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    control = ["<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = [*MOVES, *"No blocked Notes Mistakes Workflow stuck none away".split()]
    sides = [" ".join(m for i, m in enumerate(MOVES) if bits >> i & 1) or "none"
             for bits in range(16)]
    ways = [f"{a} {up}, {b} {left}" for a in range(size) for b in range(size)
            for up in MOVES[:2] for left in MOVES[2:]]
    vocab = [*control, *words, *ways, *(f"push {way}" for way in ways),
             *(f"{who}: {side}" for who in ("walls", "blocked") for side in sides),
             *(f"push {move}" for move in MOVES)]
    ids = {word: i for i, word in enumerate(vocab)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|unk|>"))
    move = "(?:" + "|".join(MOVES) + ")"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(
        rf"(?:walls|blocked): (?:none|{move}(?: {move})*)|(?:push )?\d+ {move}, \d+ {move}"
        rf"|push {move}|" + "|".join(rf"\b{word}\b" for word in words)), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>",
        additional_special_tokens=control[2:4], chat_template=TINY_TEMPLATE)


def share_read(text, size):
    """The share of a text's words that the player's tokenizer reads: about half of a room's."""
    read = tiny_tokenizer(size).backend_tokenizer.encode(text, add_special_tokens=False)
    words = re.compile(r"[^\W_]+")
    known = sum(len(words.findall(text[start:end])) for start, end in read.offsets)
    return known / max(1, len(words.findall(text)))


def tiny_model(tokenizer, seed):
    """A stock Llama of 0.1 million parameters with fresh weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, "tiny"))
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=10**6,
            initializer_range=0.1,             # with the usual 0.02 so narrow a model hardly starts
            tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None))


def player_folder(cfg, skill_text):
    """Where the warm start of these settings is kept: named by all that it depends on."""
    names = ("seed size boxes min_moves max_moves max_turns train_levels test_levels "
             "warm_demos timid").split()
    key = repr([PLAYER_VERSION, skill_text, WARM, *(getattr(cfg, name) for name in names)])
    return Path(cfg.out) / f"warm-start-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def encode_games(games, tokenizer, skill_text):
    """[(ids, probs)] of games as `demonstrate` makes them: the conversation up to the last move,
    which is a target alone; without the map, which the tokenizer does not see."""
    texts = []
    for level, states, moves, _, notes in games:
        said = [describe(level, *state) for state in states[:-1]]
        for turn in range(1, len(moves)):
            if states[turn] == states[turn - 1]:
                said[turn] = f"{BLOCKED}\n{said[turn]}"
        if notes:
            said[0] = f"{skill_text.format(**notes)}\n\n{said[0]}"
        text = "<|end|>".join(f"<|user|>{text}<|assistant|>{MOVES[move]}"
                              for text, move in zip(said, moves))
        texts.append(text.removesuffix(MOVES[moves[-1]]))
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [(found.ids, game[3]) for found, game in zip(encoded, games)]


def player_kl(model, tokenizer, batch):
    """KL(player || model) at each turn of encoded games, (turns,), over the moves."""
    import torch
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])           # (B, L)
    asked = ids == tokenizer.convert_tokens_to_ids("<|assistant|>")
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[asked]
    moves = tokenizer.convert_tokens_to_ids([*MOVES])
    logp = model.lm_head(hidden).log_softmax(-1)[:, moves]     # over all words, then (turns, 4)
    p = torch.tensor(sum((probs for _, probs in batch), []))
    return (p * (p.log() - logp)).sum(-1)


def warm_start(cfg, skill_text, world):
    """Returns the folder of the built-in player, who is made there if he is not yet: the clone of a
    player who is shy of boxes, less so with notes that fit, which stand where a skill will. The
    targets are his move probabilities, in rooms that no level of the world has; at held-out levels
    the clone is held against him."""
    import torch
    from tqdm import tqdm
    folder = player_folder(cfg, skill_text)
    while not is_first() and not folder.exists():
        time.sleep(0.1)                        # process 0 of torchrun makes it
    if folder.exists():
        return folder
    exclude = getattr(world, "levels", [])
    tokenizer = tiny_tokenizer(cfg.size)
    model = tiny_model(tokenizer, cfg.seed)
    data = encode_games(demonstrations(
        cfg.warm_demos, derived_seed(cfg.seed, "demos"), cfg.size, cfg.boxes, cfg.max_moves,
        cfg.max_turns, exclude, cfg.timid, WARM["noted"]), tokenizer, skill_text)
    rng, batches = random.Random(derived_seed(cfg.seed, "warm")), []
    for start in range(0, len(data), 50 * WARM["batch"]):     # similar lengths: less padding
        window = sorted(data[start:start + 50 * WARM["batch"]], key=lambda game: len(game[0]))
        window = [window[i:i + WARM["batch"]] for i in range(0, len(window), WARM["batch"])]
        batches += rng.sample(window, len(window))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for step, batch in enumerate(tqdm(batches, "warm start", disable=None)):
        done = (step + 1) / len(batches)                       # rise for a tenth, then a cosine
        for group in optimizer.param_groups:
            group["lr"] = WARM["lr"] * min(1, 10 * done) * (1 + math.cos(math.pi * done)) / 2
        loss = player_kl(model, tokenizer, batch).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, noted in (("without notes", 0.0), ("with notes", 1.0)) if exclude else ():
        games, other = [], SILENT
        for level in exclude[:512]:
            games.append(demonstrate(level, distances(level), rng, cfg.timid, cfg.max_turns, noted,
                                     other))
            other = games[-1][4] or other
        with torch.no_grad():
            kl = torch.cat([player_kl(model, tokenizer, [game])
                            for game in encode_games(games, tokenizer, skill_text)]).mean()
        solved = sum(states[-1][1] == level.goals for level, states, *_ in games) / len(games)
        tqdm.write(f"{name}, at {len(games)} held-out levels: the player solves {100 * solved:.1f} "
                   f"%, KL(player || clone) {kl:.3f}")
    save_model(folder, model, tokenizer)
    return folder


def is_first():
    """Whether this process is alone, or the first of torchrun's: it writes."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def locked(folder):
    """A run has a folder, which is made, for itself; another waits, and says so. The lock dies with
    its process. What a process that was killed had not finished is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        if is_first() and fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is at work in {folder}: waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            for part in folder.glob("*.part"):
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        yield


def save(path, data):
    """Replace a file by a finished temporary one, so that it is whole or absent: .pt by torch, else
    JSON, or a list of lines of it (.jsonl)."""
    import torch
    if not is_first():
        return
    part = path.with_name(path.name + ".part")
    lines = data if path.suffix == ".jsonl" else [data]
    try:
        if path.suffix == ".pt":
            torch.save(data, part)
        else:
            part.write_text("".join(json.dumps(x, default=vars) + "\n" for x in lines))
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                   # torch's own, for a full disk
        part.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}; is the disk full?") from error


def load(path, code=None):
    """What `save` wrote; it is said if other code did. UserError if the file is damaged."""
    import torch
    try:
        if path.suffix == ".pt":
            data = torch.load(path, map_location="cpu", weights_only=True)
        else:
            data = json.loads(path.read_text())
        if code is not None and data["code"] != code:
            print(f"{path} is of another version of skill_sd.py", flush=True)
        return data
    except Exception as error:                 # a damaged pickle raises anything
        remedy = path.parent if path.name == "bank.json" else path
        raise UserError(f"{path} is damaged ({error!r:.60}); delete {remedy}, and the same command "
                        "goes on from what is left") from error


def save_model(folder, model, tokenizer):
    """Save both to a folder that is whole or absent. If it is there, another process was quicker,
    or the same run before it was interrupted; it stays."""
    if not is_first():
        return
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, folder)
    except Exception as error:                 # safetensors has its own
        shutil.rmtree(part, ignore_errors=True)
        require(folder.exists(), f"{folder} cannot be written: {error}; is the disk full?")


def views(trajectory, untrained, trained, tokenizer):
    """What student, teacher and trained student think at each turn of an episode whose answers are
    one word each: [(chances of MOVES, log-prob of what was played)], (turns, 4) and (turns,)."""
    import torch
    t, moves = trajectory, tokenizer.convert_tokens_to_ids([*MOVES])
    found = []
    for model, prompt in (untrained, t.prompt), (untrained, t.skill_prompt), (trained, t.prompt):
        ids = torch.tensor([prompt + t.ids], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1:-1]      # these predict t.ids
        used = torch.tensor(t.mask)
        logp = logits.log_softmax(-1).cpu()[used]                            # (turns, V)
        played = torch.tensor(t.ids)[used]
        found.append((logp[:, moves].exp().tolist(), logp[range(len(played)), played].tolist()))
    return found


def watch(skill_text, trajectory, skill, views):
    """Print an episode, and the `views` at each of its turns."""
    print(f"\nThe teacher has read:\n{skill_text.format(**vars(skill))}\n\n"
          f"{trajectory.messages[0]['content']}\n\nThe untrained student's answers; the chances "
          "that it, its teacher and the trained student give the moves;\nl, the log-ratio of the "
          "first two: SDL makes what was played likelier where it is below 0.\n"
          f"{'':9}{'student up  down  left right':<30}{'teacher up  down  left right':<30}"
          f"{'trained up  down  left right':<30}   l")
    for i, message in enumerate(trajectory.messages[1::2]):
        row = f"{message['content']:<9}"
        for chances, _ in views:
            row += " " * 6 + "  ".join(f"{p:.2f}" for p in chances[i])
        print(f"{row}{views[0][1][i] - views[1][1][i]:7.2f}")


# ---- Play in a terminal --------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description="Look at and play Sokoban levels.")
    parser.add_argument("--file", help="a file with XSB levels (default: generated ones)")
    parser.add_argument("--n", type=int, default=5, help="levels to generate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=6, help="room size, walls included")
    parser.add_argument("--boxes", type=int, default=2)
    parser.add_argument("--min-moves", type=int, default=4)
    parser.add_argument("--max-moves", type=int, default=20)
    args = parser.parse_args()
    try:
        play(read_levels(args.file) if args.file else generate_levels(
            args.n, args.seed, args.size, args.boxes, args.min_moves, args.max_moves))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except (EOFError, KeyboardInterrupt):
        print()


def play(levels):
    """The levels, one after the other, in the terminal."""
    keys, arrows = dict(zip("wsad", range(4))), dict(zip("ABDC", range(4)))
    print("w a s d or arrows: move   r: restart   o: replay the optimal solution   n: next level   "
          "q: quit")
    for number, start in enumerate(levels, 1):
        level, taken = start, 0
        try:
            solution = solve(start, state_limit=200_000)       # a second or so
            said = "no solution" if solution is None else f"optimal: {len(solution)} moves"
        except RuntimeError:
            solution, said = None, "optimal: unknown"
        while True:
            print(f"\nlevel {number} of {len(levels)} ({start.task_id}), {said}, "
                  f"{taken} moves made")
            print(render(level))
            if level.completion() == 1.0:
                print("solved")
            typed = re.findall(r"\x1b(?:[\[O]\[?[\d;?]*)?(.)|(.)", input("> "))    # ESC [ A is "up"
            for arrow, key in typed:
                key = key.lower()
                move = arrows.get(arrow, keys.get(key))
                if move is not None:
                    level, taken = level.after(move), taken + 1
                elif key == "r":
                    level, taken = start, 0
                elif key == "o" and solution is not None:
                    level, taken = start, 0
                    for letter in solution:
                        level, taken = level.after(LETTERS.index(letter)), taken + 1
                        print(f"\n{letter}\n{render(level)}")
                elif key == "q":
                    return
            if ("", "n") in typed or ("", "N") in typed:
                break


if __name__ == "__main__":
    main()
