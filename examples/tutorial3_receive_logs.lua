-- Publish/Subscribe: listens to every log line, through a queue of its own.
--   lua examples/tutorial3_receive_logs.lua     (MESSAGES=1 ends it after one line)
local moonrabbit = require "moonrabbit"
io.stdout:setvbuf "line"

local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
local ch = assert(conn:channel())
assert(ch:exchange_declare("logs", { type = "fanout" }))
local queue = assert(ch:queue_declare("", { exclusive = true })).queue -- the broker names it
assert(ch:queue_bind(queue, "logs"))

local left = tonumber(os.getenv "MESSAGES" or math.huge)
local consumer = assert(ch:consume(queue, { no_ack = true }))
print " [*] Waiting for logs. To exit press CTRL+C"
for msg in consumer:messages() do
  print(" [x] " .. msg.body)
  left = left - 1
  if left <= 0 then break end
end
conn:close()
