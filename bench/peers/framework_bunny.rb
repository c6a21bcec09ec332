# bunny: a subscription with manual acks, its work pool of one thread as by default.
require "bunny"
require "json"

mode, url, *numbers = ARGV
size, count, prefetch = numbers.map(&:to_i)
abort "usage: framework_bunny.rb consume URL SIZE COUNT PREFETCH" unless mode == "consume" && numbers.size == 3
name = ENV.fetch("BENCH_QUEUE")

def now = Process.clock_gettime(Process::CLOCK_MONOTONIC)
def cpu = Process.clock_gettime(Process::CLOCK_PROCESS_CPUTIME_ID)
def rss = File.read("/proc/self/status")[/VmHWM:\s+(\d+)/, 1].to_i

connection = Bunny.new(url)
connection.start
channel = connection.create_channel
channel.prefetch(prefetch)
queue = channel.queue(name, durable: true)
left = count
started = nil
done = Queue.new

queue.subscribe(manual_ack: true) do |delivery, _properties, body|
  started ||= [now, cpu]
  abort "a body of another size" if body.bytesize != size
  channel.ack(delivery.delivery_tag)
  left -= 1
  done << true if left.zero?
end
done.pop
channel.queue_declare(name, durable: true, passive: true) # answered after the acks
puts JSON.generate(
  messages: count, seconds: now - started[0], cpu_us: (cpu - started[1]) / count * 1e6, rss_kb: rss
)
connection.close
