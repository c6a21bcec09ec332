"""aio-pika with a handler, as its documentation has it: a robust connection, and
message.process(), which acks when the block ends without an error."""
import asyncio
import json
import os
import resource
import sys
import time

import aio_pika


def cpu():
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


def rss():
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


async def consume(url, name, size, count, prefetch):
    left, started, done = count, None, asyncio.Event()

    async def handler(message):
        nonlocal left, started
        async with message.process():
            if started is None:
                started = (time.monotonic(), cpu())
            if len(message.body) != size:
                raise ValueError("a body of another size")
        left -= 1
        if left == 0:
            done.set()

    connection = await aio_pika.connect_robust(url)
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=prefetch)
    queue = await channel.declare_queue(name, durable=True)
    await queue.consume(handler)
    await done.wait()
    # Answered after the acks, on the same channel.
    await channel.declare_queue(name, durable=True, passive=True)
    print(json.dumps({
        "messages": count,
        "seconds": time.monotonic() - started[0],
        "cpu_us": (cpu() - started[1]) / count * 1e6,
        "rss_kb": rss(),
    }), flush=True)
    await connection.close()


def main():
    if len(sys.argv) != 6 or sys.argv[1] != "consume":
        sys.exit("usage: framework_aio_pika.py consume URL SIZE COUNT PREFETCH")
    size, count, prefetch = map(int, sys.argv[3:])
    asyncio.run(consume(
        sys.argv[2], os.environ["BENCH_QUEUE"], size, count, prefetch))


main()
