-- Work Queues: a worker. Start several: the tasks are shared out among them.
--   lua examples/tutorial2_worker.lua           (MESSAGES=3 ends it after three tasks)
local moonrabbit = require "moonrabbit"
io.stdout:setvbuf "line"

local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
local ch = assert(conn:channel { prefetch = 1 }) -- one task at a time: the next goes to whoever is free
assert(ch:queue_declare("task_queue", { durable = true }))

local left = tonumber(os.getenv "MESSAGES" or math.huge)
local consumer = assert(ch:consume "task_queue")
print " [*] Waiting for messages. To exit press CTRL+C"
for msg in consumer:messages() do
  print(" [x] Received '" .. msg.body .. "'")
  local _, dots = msg.body:gsub("%.", "")
  moonrabbit.sleep(dots) -- heartbeats go on meanwhile
  print " [x] Done"
  msg:ack() -- only now may the broker forget it; a worker that dies before loses nothing
  left = left - 1
  if left <= 0 then break end
end
conn:close()
