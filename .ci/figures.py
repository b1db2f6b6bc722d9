# SPDX-License-Identifier: MIT
"""The pictures and tables of the README and of .github/results.md, from finished runs.

    python .ci/figures.py [--out runs] [--seed 10 --seeds 5]     needs matplotlib, as nothing else

It writes .github/*.svg and prints the tables. Runs are read, and made where they are missing, but
for those of TABLES, which compare what is there."""
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd
import sokoban_env

OUT = Path(__file__).parent.parent / ".github"
METHODS = {                      # name: label, colour
    "grpo": ("GRPO", "#1f77b4"), "empty_skill": ("empty skill", "#7f9fb5"),
    "other_skill": ("another's skill", "#9467bd"), "skill_sd": ("Skill-SD", "#d62728"),
    "borrowed": ("with borrowing", "#ff9f1c"), "opd": ("SDL alone", "#2ca02c")}
GREY = "#888888"                 # is read on white and on black
plt.rcParams |= {
    "svg.fonttype": "none", "font.size": 11, "font.family": "sans-serif", "axes.edgecolor": GREY,
    "text.color": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.spines.top": False, "axes.spines.right": False}
SCARCE = dict(preset="scarce")
FEW = SCARCE | dict(train_levels=64)
TABLES = [                       # of finished runs: {name: (variant of .ci/variants.py, settings)}
    {"UCB": ("ucb", FEW), "UCB, c = 0": ("ucb", FEW | dict(ucb_c=0.0)),
     "UCB, c = 2": ("ucb", FEW | dict(ucb_c=2.0)), "random": ("random_pick", FEW),
     "newest": ("newest", FEW), "UCB, failures": ("ucb,failures", FEW),
     "random, failures": ("random_pick,failures", FEW)},
    {"\u03bb 0.1": ("", SCARCE), "\u03bb 0.03": ("", SCARCE | dict(lam=0.03)),
     "\u03bb 0.3": ("", SCARCE | dict(lam=0.3)), "\u03bb 1": ("", SCARCE | dict(lam=1.0)),
     "\u03bb falling to 0": ("falling", SCARCE), "KL over all words": ("exact", SCARCE)},
    {"borrowed": ("", SCARCE | dict(method="borrowed")),
     "from the nearest": ("nearest", SCARCE | dict(method="borrowed"))}]
ALL = ["base", *METHODS, "skill_grpo", "frozen", "off_policy_frozen", "off_policy"]


def finished(typed, preset, names):
    """{name: [result of each seed]}, and the number of episodes in an iteration."""
    plans = skill_sd.plan(**typed | dict(method=",".join(names), preset=preset))
    cfg = plans[names[0]][0]
    results = {name: [skill_sd.train(cfg) for cfg in plans[name]] for name in names}
    return results, cfg.tasks_per_iteration * cfg.group_size


def measured(run):
    """(3,) percent: sampled and greedy accuracy at the end, area under the curve."""
    return 100 * np.array([np.equal(run["sampled"], 1).mean(), np.equal(run["greedy"], 1).mean(),
                           np.mean([y for _, y in run["curve"]])])


def half_width(values):
    """Half of the 95 % interval (Student's t) of the means over the first axis, the seeds."""
    quantile = skill_sd.QUANTILES[len(values) - 1]
    return quantile * values.std(0, ddof=1) / len(values) ** 0.5


def interval(values):
    """Mean and 95 % interval of each column, as text."""
    return [f"{mean:.1f} ±{x:.1f}" for mean, x in zip(values.mean(0), half_width(values))]


def tables(runs):
    for preset, (results, _) in runs.items():
        found = {name: np.array([measured(run) for run in of_method])        # (seeds, 3)
                 for name, of_method in results.items()}
        print(f"\n{preset}\n|method|sampled|greedy|area|gain over grpo: sampled|area|\n|---|" +
              "---|" * 5)
        for name, values in found.items():
            gain = interval(values - found["grpo"])
            row = [*interval(values), gain[0], gain[2]]
            print("|".join(["", name, *(row[:3] + [""] * 2 if name == "grpo" else row), ""]))
        for a, b in (("empty_skill", "grpo"), ("skill_sd", "empty_skill"),
                     ("skill_sd", "other_skill"), ("borrowed", "skill_sd")):
            end, _, area = interval(found[a] - found[b])
            print(f"{a} - {b}: sampled {end}, area {area}")


def compare(table, typed):
    """Accuracy at the end, and area, over the seeds of which all runs of a table are there."""
    paths, out = [], typed.get("out", "runs")                  # of each row, by seed
    for variant, settings in table.values():
        where = dict(out=f"{out}/variants/{variant}" if variant else out)
        cfgs = skill_sd.plan(**typed | settings | where)[settings.get("method", "skill_sd")]
        paths.append([skill_sd.run_folder(cfg) / "result.json" for cfg in cfgs])
    seeds = [each for each in zip(*paths) if all(path.exists() for path in each)]
    if len(seeds) < 2:
        return
    values = np.array([[measured(skill_sd.load(path))[[0, 2]] for path in each] for each in seeds])
    first, *_ = table
    print(f"\n|{len(seeds)} seeds|sampled|area|less {first}: sampled|area|\n|---|" + "---|" * 4)
    for i, name in enumerate(table):                           # values: (seeds, rows, 2)
        less = interval(values[:, i] - values[:, 0]) if i else [""] * 2
        print("|".join(["", name, *interval(values[:, i]), *less, ""]))


def curves(runs):
    """Held-out accuracy over episodes: means and 95 % bands over the seeds."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.9))
    titles = "scarce reward", "plentiful reward"
    for ax, (results, episodes), title in zip(axes, runs.values(), titles):
        ends = {}
        for name, (label, colour) in METHODS.items():
            points = np.array([run["curve"] for run in results[name]])       # (seeds, points, 2)
            x, y = points[0, :, 0] * episodes, 100 * points[:, :, 1]
            half = half_width(y)
            ax.plot(x, y.mean(0), color=colour, lw=2)
            ax.fill_between(x, y.mean(0) - half, y.mean(0) + half, color=colour, alpha=0.1, lw=0)
            ends[label, colour] = y.mean(0)[-1]
        ax.set_ylim(0)
        gap = ax.get_ylim()[1] / 15                            # labels keep a distance
        at = np.inf
        for (label, colour), end in sorted(ends.items(), key=lambda item: -item[1]):
            at = min(at - gap, max(end, 0))
            ax.annotate(label, (x[-1], at), (6, 0), textcoords="offset points", va="center",
                        color=colour, annotation_clip=False)
        ax.set_title(title, color=GREY)
        ax.set_xlabel("episodes")
    axes[0].set_ylabel("held-out levels solved, %")
    fig.suptitle("mean and 95 % band over five seeds; the tables pair by seed", fontsize=9)
    fig.tight_layout(w_pad=4)
    fig.savefig(OUT / "curves.svg", transparent=True)


def room(ax, level):
    """One state of a room, as an image."""
    grid = np.zeros((level.height, level.width, 4))
    for cell in range(level.width * level.height):
        colour = "#8d99ae" if level.walls >> cell & 1 else "#edf2f4"
        grid[divmod(cell, level.width)] = matplotlib.colors.to_rgba(colour)
    ax.imshow(grid)
    for mask, style in (level.goals, dict(marker="X", color="#2a9d8f", s=60)), (
            level.boxes, dict(marker="s", color="#c8803a", s=110, alpha=0.9)), (
            1 << level.player, dict(marker="o", color="#1d3557", s=60)):
        cells = sokoban_env.cells_of(mask)
        ax.scatter([c % level.width for c in cells], [c // level.width for c in cells], **style)
    named = dict(fontsize=7, color="white", ha="center", va="center")      # as in c5, on the walls
    for column in range(1, level.width - 1):
        ax.text(column, 0, chr(97 + column), **named)
    for row in range(1, level.height - 1):
        ax.text(0, row, row + 1, **named)
    ax.set_axis_off()


def teacher(typed):
    """An episode as a strip of rooms, with the moves' chances of three players."""
    cfg = skill_sd.plan(**typed | dict(method="skill_sd", preset="tiny"))["skill_sd"][0]
    skill_sd.train(cfg)
    t, skill, views = skill_sd.look_inside(cfg)
    turns = min(t.turns, 6)
    size = max(5.5, 1.75 * turns), 4.2
    fig, axes = plt.subplots(2, turns, figsize=size, height_ratios=[1.3, 1])
    groups = zip(("student", "teacher", "trained student"), views, (GREY, "#d62728", "#1f77b4"))
    rooms = [sokoban_env.room_in(m["content"]) for m in t.messages[::2]]
    for i in range(turns):
        room(axes[0, i], rooms[i])
    for j, (name, (chances, _), colour) in enumerate(groups):
        for i in range(turns):
            axes[1, i].bar(np.arange(4) + 0.27 * (j - 1), chances[i], 0.25, color=colour,
                           label=name)
    for i in range(turns):
        ax = axes[1, i]
        l = views[0][1][i] - views[1][1][i]
        ax.set_xticks(range(4), "\u2191\u2193\u2190\u2192")
        ax.set_ylim(0, 1)
        ax.set_yticks([])
        axes[0, i].set_title(f"plays {t.messages[1 + 2 * i]['content']}", color=GREY, fontsize=10)
        does = "leaves" if abs(l) < 0.05 else "rewards" if l < 0 else "punishes"
        ax.set_xlabel(f"l = {l:+.2f}: SDL\n{does} it", fontsize=9)
    axes[1, 0].set_ylabel("chance of a move", fontsize=9)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncol=3, fontsize=9, frameon=False,
               labelcolor=GREY)
    fig.suptitle(f"The best of 8 episodes. Its teacher has read: {skill.golden_workflow}",
                 color=GREY, fontsize=10)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    fig.savefig(OUT / "teacher.svg", transparent=True)


def main():
    typed = dict(seed=10, seeds=5) | skill_sd.Config.parse_args()
    runs = {"scarce": finished(typed, "scarce", ALL),
            "tiny": finished(typed, "tiny", ["base", *METHODS])}
    curves(runs)
    teacher(typed)
    tables(runs)
    for table in TABLES:
        compare(table, typed)


if __name__ == "__main__":
    main()
