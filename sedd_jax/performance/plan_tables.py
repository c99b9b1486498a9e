"""What `sedd plan` prints."""

from typing import Any

_WIDTH = 28


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    config = result["config"]
    network, groups = config["network"], result["num_slices"] * result["num_hosts"]
    batch = config["sampling"]["num_samples"] if result["sample"] else config["training"]["batch_size"]
    devices = f"{f'{groups} x ' if groups > 1 else ''}{result['topology']}: {result['num_devices']} devices"
    lines = [
        f"{'sampling' if result['sample'] else 'training'} step of {network['hidden_size']} x {network['num_layers']}, "
        f"{batch} sequences of {config['data']['length']}, {result['vocab_size']} tokens, {network['dtype']}, "
        f"remat {network['remat']}",
        f"on {devices} ({result['accelerator']}), mesh "
        + ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items()),
        "",
    ]
    if not result["fits"]:
        lines.append(f"DOES NOT FIT: {result['why']}")
        if "remedy" in result:
            flags = " ".join(f"--config.{name}={value}" for name, value in result["remedy"].items())
            lines.append(f"fits with {flags}")
        elif not result["sample"]:
            lines.append("nor with remat=blocks, one sequence a device and micro-batch, and all arrays sharded")
        return "\n".join(lines)
    memory = result["memory_gib"]
    lines += [f"{'GiB a device':<22}{sum(memory.values()):>8.2f} of {result['hbm_gib']:.0f}: fits"]
    lines += [f"  {name:<20}{value:>8.2f}" for name, value in memory.items()]
    lines += [f"{'collectives a step':<28}{'number':>8}{'GB sent by a device':>22}"]
    lines += [
        f"  {kind:<26}{of['number']:>8}{of['bytes_sent'] / 1e9:>22.3f}" for kind, of in result["collectives"].items()
    ]
    lines += ["milliseconds at peak rates"]
    lines += [
        f"  {name:<20}" + ("no figure is published: not counted" if seconds is None else f"{1e3 * seconds:>8.1f}")
        for name, seconds in result["seconds"].items()
    ]
    lines += _time_lines(result["kernels"])
    estimate = result["estimate"]
    lines += [
        f"at best {_speed(result, result)}",
        f"estimate {1e3 * estimate['seconds']:.1f} ms a step, {_speed(estimate, result)}",
        f"  ({estimate['basis']})",
    ]
    return "\n".join(lines)


def _speed(of: dict[str, Any], result: dict[str, Any]) -> str:
    goal = (
        f"for samples of {result['num_steps']:,} steps"
        if result["sample"]
        else f"{of['days']:.1f} days for {result['config']['training']['num_steps']:,} steps"
    )
    return f"{of['tokens_per_second']:,.0f} tokens/s, {of['utilization']:.0%} of peak, {goal}"


def _time_lines(costs: dict[str, Any]) -> list[str]:
    """Where the time of a step's kernels goes."""
    head = f"{'ms':>8}{'calls':>8}{'GB':>8}{'TFLOP':>8}"
    lines = []
    for title, sums in (("time by kind of kernel", costs["kinds"]), ("by part of the step", costs["scopes"])):
        lines += [f"{title:<{_WIDTH}}{head}"]
        lines += [f"  {name:<{_WIDTH - 2}}{_numbers(of)}" for name, of in sums.items()]
    lines += [f"{'dearest kernels':<{_WIDTH}}{head}"]
    for of in costs["dearest"]:
        operation = "/".join(of["where"].split("/")[-2:])
        what = _shortened(f"{operation} {' '.join(of['arrays'])}")
        lines += [f"  {of['scope']:<{_WIDTH - 2}}{_numbers(of)}  {of['name']}: {what}"]
    return lines


def _numbers(of: dict[str, float]) -> str:
    moved = of["bytes_read"] + of["bytes_written"]
    return f"{1e3 * of['seconds']:>8.2f}{of['calls']:>8.0f}{moved / 1e9:>8.1f}{of['flops'] / 1e12:>8.2f}"


def _shortened(text: str, length: int = 70) -> str:
    return text if len(text) <= length else text[:length] + "..."
