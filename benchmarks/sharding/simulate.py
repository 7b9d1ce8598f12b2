# SPDX-License-Identifier: Apache-2.0
"""What a sharded training step takes, from what one rank does alone.

  python3 benchmarks/sharding/simulate.py      the tables of docs/sharding.md
  python3 benchmarks/sharding/simulate.py --model 8B --ranks 64

Plays the schedule of sharding/gathered_weights.h, reduced_gradients.h and
trainer/embedding_rows.h: one queue of collectives beside one of compute, two
places for gathered blocks, two for gradients that are on their way; rows of the
embedding's gradient instead of a table where they are less. Rates are
arguments: what a rank computes with alone (measured), what a link carries
(measured, or published: the defaults, whose sources docs/sharding.md names).
"""

import argparse
import dataclasses
import json

GIGA = 1e9
GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    def block(self):
        """Parameters of one block; norms are left out."""
        qkv = self.hidden * self.head_dim * (self.heads + 2 * self.kv_heads)
        out = self.hidden * self.head_dim * self.heads
        return qkv + out + 3 * self.hidden * self.ffn

    def embedding(self):
        return self.vocab * self.hidden

    def parameters(self):
        return self.layers * self.block() + self.embedding() * (
            1 if self.tied else 2
        )


MODELS = {
    model.name: model
    for model in [
        Model("1B", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
        Model("3B", 28, 3072, 8192, 24, 8, 128, 128256, tied=True),
        Model("8B", 32, 4096, 14336, 32, 8, 128, 128256),
        Model("14B", 40, 5120, 17408, 40, 8, 128, 151936),
        Model("32B", 64, 5120, 25600, 64, 8, 128, 151936),
        Model("70B", 80, 8192, 28672, 64, 8, 128, 128256),
        Model("135M", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
    ]
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Rates of one rank.

    flops: of products, a second; what a rank reaches alone.
    bandwidth: bytes a second that a rank sends in an all-gather or a
        reduce-scatter of its shard group (bus bandwidth).
    replica_bandwidth: the same between replicas.
    latency: seconds that a collective takes at least.
    """

    flops: float
    bandwidth: float
    replica_bandwidth: float
    latency: float


@dataclasses.dataclass(frozen=True)
class Job:
    """ranks = shards * replicas; tokens: of a rank, a micro-batch."""

    model: Model
    shards: int
    replicas: int
    tokens: int
    length: int
    micro_batches: int = 1
    reshard: bool = True
    weight_bytes: int = 2
    gradient_bytes: int = 4


class Queue:
    """Work that is done in order."""

    def __init__(self):
        self.free = 0.0
        self.busy = 0.0

    def run(self, ready, seconds):
        """When work that is ready at `ready` is done."""
        self.free = max(self.free, ready) + seconds
        self.busy += seconds
        return self.free


@dataclasses.dataclass
class Step:
    seconds: float
    compute: float
    communication: float

    @property
    def hidden(self):
        """The share of communication that compute covers."""
        if self.communication == 0:
            return 1.0
        exposed = max(0.0, self.seconds - self.compute)
        return 1 - min(1.0, exposed / self.communication)


class Schedule:
    def __init__(self, job, cluster):
        self.job, self.cluster = job, cluster
        self.compute, self.links = Queue(), Queue()
        model = job.model
        # Units: embedding, blocks, head; a tied head has the first's weights.
        self.sizes = (
            [model.embedding()]
            + [model.block()] * model.layers
            + [0 if model.tied else model.embedding()]
        )
        self.gathered = {}  # unit: when it is there
        self.place_free = {}  # place: when it may be overwritten
        self.in_place = {}  # place: unit
        self.reduced = {}  # place: when its gradient has been reduced

    def place(self, unit):
        last = len(self.sizes) - 1
        if unit in (0, last):
            return "ends"
        return unit % 2 if self.job.reshard else unit

    def forward_seconds(self, unit):
        """Products, and causal attention over half of the square."""
        job, model = self.job, self.job.model
        if unit == 0:
            return 0.0
        if unit == len(self.sizes) - 1:
            flops = 2 * model.embedding() * job.tokens
        else:
            flops = 2 * model.block() * job.tokens
            flops += 2 * model.heads * model.head_dim * job.tokens * job.length
        return flops / self.cluster.flops

    def move(self, elements, bytes_each, bandwidth, ranks):
        if ranks == 1 or elements == 0:
            return 0.0
        sent = elements * bytes_each * (ranks - 1) / ranks
        return self.cluster.latency + sent / bandwidth

    def gather(self, unit, now):
        if self.job.shards == 1 or self.sizes[unit] == 0:
            return now
        place = self.place(unit)
        if self.in_place.get(place) == unit:
            return self.gathered[unit]
        seconds = self.move(
            self.sizes[unit],
            self.job.weight_bytes,
            self.cluster.bandwidth,
            self.job.shards,
        )
        ready = max(now, self.place_free.get(place, 0.0))
        self.in_place[place] = unit
        self.gathered[unit] = self.links.run(ready, seconds)
        return self.gathered[unit]

    def visit(self, unit, following, factor, now):
        """Gathers, computes; returns when it began and ended."""
        head = (
            0 if unit == len(self.sizes) - 1 and self.sizes[unit] == 0 else unit
        )
        ready = self.gather(head, now)
        begin = max(self.compute.free, ready)
        if following is not None:
            self.gather(following, begin)
        end = self.compute.run(ready, factor * self.forward_seconds(unit))
        self.place_free[self.place(head)] = end
        return end

    def reduce_seconds(self, elements):
        job, cluster = self.job, self.cluster
        seconds = self.move(
            elements, job.gradient_bytes, cluster.bandwidth, job.shards
        )
        # An all-reduce sends everything twice.
        return seconds + 2 * self.move(
            elements / job.shards,
            job.gradient_bytes,
            cluster.replica_bandwidth,
            job.replicas,
        )

    def reduce(self, unit, ready):
        seconds = self.reduce_seconds(self.sizes[unit])
        if seconds > 0:
            self.reduced[self.place(unit)] = self.links.run(ready, seconds)

    def rows(self):
        """Elements of all ranks' rows of the embedding's gradient; None if
        tables are summed."""
        job = self.job
        rows = job.shards * job.tokens * job.model.hidden
        table = job.model.embedding() * job.gradient_bytes
        if job.replicas > 1 or 2 * rows * job.weight_bytes > table:
            return None
        return rows

    def backward(self, now):
        last = len(self.sizes) - 1
        rows = self.rows()
        # A table that embedding and head share is whole only at the end.
        head_alone = rows is not None or not self.job.model.tied
        head_seconds = self.reduce_seconds(self.job.model.embedding())
        for unit in range(last, 0, -1):
            following = unit - 1 if unit > 1 else None
            # Its gradient's place must have been reduced.
            now = max(now, self.reduced.get(self.place(unit), 0.0))
            now = self.visit(unit, following, 2, now)
            if unit < last:
                self.reduce(unit, now)
            elif head_alone and head_seconds > 0:
                self.reduced["ends"] = self.links.run(now, head_seconds)
        if rows is None:
            self.reduce(0, now)
            return now
        done = self.links.run(
            now,
            self.move(
                rows,
                self.job.weight_bytes,
                self.cluster.bandwidth,
                self.job.shards,
            ),
        )
        self.reduced[self.place(0)] = done
        return now

    def run(self):
        now = 0.0
        last = len(self.sizes) - 1
        for _ in range(self.job.micro_batches):
            for unit in range(last + 1):
                following = unit + 1 if unit < last else None
                now = self.visit(unit, following, 1, now)
            now = self.backward(now)
        seconds = max(self.compute.free, self.links.free)
        return Step(seconds, self.compute.busy, self.links.busy)


def memory(job):
    """Bytes of a rank by class, activations left out."""
    model = job.model
    shard = model.parameters() / job.shards
    ends = model.embedding()
    gathered = 0.0
    on_their_way = 0.0
    if job.shards > 1:
        blocks = 2 if job.reshard else model.layers
        gathered = job.weight_bytes * (blocks * model.block() + ends)
        on_their_way = job.gradient_bytes * (2 * model.block() + ends)
    return {
        "parameters": 4 * shard,
        "gradients": job.gradient_bytes * shard,
        "optimizer": 8 * shard,
        "gathered": gathered,
        "on their way": on_their_way,
    }


def threshold(job, cluster):
    """Tokens of a rank's micro-batch above which communication is hidden."""
    sent = 2 * job.weight_bytes + job.gradient_bytes
    return (
        sent
        * (job.shards - 1)
        / job.shards
        * cluster.flops
        / (6 * cluster.bandwidth)
    )


# NVLink within eight GPUs; eight 400 Gb/s links out of a node, or one of 100.
LINKS = {"nvlink": 361 * GIGA, "8x400G": 350 * GIGA, "1x100G": 11 * GIGA}


def print_tables(cluster_flops, tokens, length):
    print(f"{'model':6} {'ranks':>5} {'state':>7} {'gathered':>9}  GiB a rank")
    for name in ["1B", "3B", "8B", "14B", "32B", "70B"]:
        for ranks in [1, 8, 64, 1024]:
            job = Job(MODELS[name], ranks, 1, tokens, length)
            parts = memory(job)
            state = sum(
                parts[key] for key in ["parameters", "gradients", "optimizer"]
            )
            rest = parts["gathered"] + parts["on their way"]
            print(f"{name:6} {ranks:5} {state / GIB:7.1f} {rest / GIB:9.1f}")
    print()
    print(
        f"{'model':6} {'ranks':>5} {'layout':>9} {'link':>7} {'tok/s':>10} "
        f"{'of one':>7} {'hidden':>7} {'threshold':>9}"
    )
    for name in ["1B", "8B", "70B"]:
        for ranks in [8, 64, 1024]:
            layouts = (
                [(ranks, 1)] if ranks == 8 else [(ranks, 1), (8, ranks // 8)]
            )
            for shards, replicas in layouts:
                for link in ["8x400G", "1x100G"] if ranks > 8 else ["nvlink"]:
                    # A node's links are shared by its eight ranks.
                    outside = LINKS[link] / (1 if link == "nvlink" else 8)
                    inside = shards == 8
                    cluster = Cluster(
                        cluster_flops,
                        LINKS["nvlink"] if inside else LINKS[link],
                        outside,
                        20e-6 + 1e-6 * shards,
                    )
                    job = Job(MODELS[name], shards, replicas, tokens, length)
                    step = Schedule(job, cluster).run()
                    alone = Schedule(
                        dataclasses.replace(job, shards=1, replicas=1), cluster
                    ).run()
                    print(
                        f"{name:6} {ranks:5} {f'{shards}x{replicas}':>9} "
                        f"{link:>7} {ranks * tokens / step.seconds:10.0f} "
                        f"{alone.seconds / step.seconds:7.2f} "
                        f"{step.hidden:7.2f} "
                        f"{threshold(job, cluster):9.0f}"
                    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS))
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--keep-gathered", action="store_true")
    parser.add_argument(
        "--tflops", type=float, default=450, help="that a rank reaches alone"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=361, help="GB/s in a shard group"
    )
    parser.add_argument(
        "--replica-bandwidth", type=float, default=45, help="GB/s between them"
    )
    parser.add_argument("--latency", type=float, default=30e-6, help="seconds")
    args = parser.parse_args()
    if args.model is None:
        print_tables(args.tflops * 1e12, args.tokens, args.length)
        return
    job = Job(
        MODELS[args.model],
        args.ranks // args.replicas,
        args.replicas,
        args.tokens,
        args.length,
        args.micro_batches,
        not args.keep_gathered,
    )
    cluster = Cluster(
        args.tflops * 1e12,
        args.bandwidth * GIGA,
        args.replica_bandwidth * GIGA,
        args.latency,
    )
    step = Schedule(job, cluster).run()
    print(
        json.dumps(
            {
                "bench": "simulate",
                "model": args.model,
                "ranks": args.ranks,
                "replicas": args.replicas,
                "tokens": args.tokens,
                "step_s": step.seconds,
                "compute_s": step.compute,
                "communication_s": step.communication,
                "hidden": step.hidden,
                "tok_s": args.ranks
                * args.tokens
                * args.micro_batches
                / step.seconds,
                "threshold_tokens": threshold(job, cluster),
                "bytes": memory(job),
            }
        )
    )


if __name__ == "__main__":
    main()
