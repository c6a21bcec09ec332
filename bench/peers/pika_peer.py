"""pika: its SelectConnection, since the BlockingConnection can have only one
publish unconfirmed; the round trip is the BlockingConnection's own way."""
import json
import os
import resource
import sys
import time

import pika

PERSISTENT = pika.BasicProperties(delivery_mode=2)
started = cpu_started = 0.0


def cpu():
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


def start():
    global started, cpu_started
    cpu_started = cpu()
    started = time.monotonic()


def rss():
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


def report(count, trips=None):
    seconds = time.monotonic() - started
    out = {
        "messages": count,
        "seconds": seconds,
        "cpu_us": (cpu() - cpu_started) / count * 1e6,
        "rss_kb": rss(),
    }
    if trips:
        out["median_us"] = sorted(trips)[len(trips) // 2] * 1e6
    print(json.dumps(out), flush=True)


def die(*what):
    print("peer:", *what, file=sys.stderr, flush=True)
    os._exit(1)


def run(url, queue, ready):
    """Calls ready(connection, channel) once the queue is there."""

    def on_channel(channel):
        channel.add_on_close_callback(closed)
        channel.queue_declare(
            queue, durable=True, callback=lambda _: ready(connection, channel))

    def closed(_, reason):
        if not connection.is_closing and not connection.is_closed:
            die(reason)

    connection = pika.SelectConnection(
        pika.URLParameters(url),
        on_open_callback=lambda c: c.channel(on_open_callback=on_channel),
        on_open_error_callback=lambda _, e: die(e),
        on_close_callback=lambda c, _: c.ioloop.stop())
    connection.ioloop.start()


def publish(url, queue, size, count, window):
    body = b"x" * size
    state = {"next": 1, "base": 1}
    singles = set()

    def ready(connection, channel):
        def more():
            tag = state["next"]
            last = min(state["base"] + window, count + 1)
            while tag < last:
                channel.basic_publish("", queue, body, PERSISTENT, True)
                tag += 1
            state["next"] = tag

        def on_confirm(frame):
            method = frame.method
            if not isinstance(method, pika.spec.Basic.Ack):
                die("nacked")
            base = state["base"]
            if method.multiple:
                base = max(base, method.delivery_tag + 1)
                if singles:
                    singles.difference_update(
                        [tag for tag in singles if tag < base])
            elif method.delivery_tag == base:
                base += 1
            else:
                singles.add(method.delivery_tag)
            while base in singles:
                singles.remove(base)
                base += 1
            state["base"] = base
            if base > count:
                report(count)
                connection.close()
            else:
                more()

        def selected(_):
            start()
            more()

        channel.confirm_delivery(on_confirm, callback=selected)

    run(url, queue, ready)


def consume(url, queue, size, count, prefetch):
    state = {"left": count}

    def ready(connection, channel):
        def finished(_):
            report(count)
            connection.close()

        def on_message(_, method, __, body):
            left = state["left"]
            if left == 0:
                return
            if len(body) != size:
                die("a body of another size")
            channel.basic_ack(method.delivery_tag)
            state["left"] = left = left - 1
            if left == 0:
                channel.queue_declare(queue, passive=True, callback=finished)

        def limited(_):
            start()
            channel.basic_consume(queue, on_message)

        channel.basic_qos(prefetch_count=prefetch, callback=limited)

    run(url, queue, ready)


def roundtrip(url, queue, size, count):
    body = b"x" * size
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.queue_declare(queue, durable=True)
    channel.confirm_delivery()
    trips = []
    start()
    for _ in range(count):
        sent = time.monotonic()
        channel.basic_publish("", queue, body, PERSISTENT, True)
        trips.append(time.monotonic() - sent)
    report(count, trips)
    connection.close()


def main():
    if len(sys.argv) != 6:
        die("usage: pika_peer.py MODE URL SIZE COUNT WINDOW")
    mode, url = sys.argv[1:3]
    size, count, window = map(int, sys.argv[3:])
    queue = os.environ.get("BENCH_QUEUE") or "bench-%d" % size
    if mode == "publish":
        publish(url, queue, size, count, window)
    elif mode == "consume":
        consume(url, queue, size, count, window)
    elif mode == "roundtrip":
        roundtrip(url, queue, size, count)
    else:
        die("unknown mode")


main()
