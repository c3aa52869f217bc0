"""What a measurement says: tables, and its progress beside them."""
import statistics
import sys


def progress(text):
    print(text, file=sys.stderr, flush=True)


def row(cells):
    return "| " + " | ".join(cells) + " |"


def rule(head):
    return "|---" * len(head) + "|"


def times_table(title, found, goals):
    """p50, p99 and maximum of some times; with goals of some of the p99, whether they were reached."""
    head = [title, "runs", "p50", "p99", "max"] + ["goal of p99"] * bool(goals)
    lines = ["", row(head), rule(head)]
    for name, times in found.items():
        times = sorted(times)
        p99 = times[max(0, -(-len(times) * 99 // 100) - 1)]
        cells = [name, str(len(times)), f"{statistics.median(times):.1f}", f"{p99:.1f}", f"{times[-1]:.1f}"]
        if goals:
            cells.append(f"below {goals[name]}: {'yes' if p99 < goals[name] else 'no'}" if name in goals else "")
        lines.append(row(cells))
    return "\n".join(lines)
