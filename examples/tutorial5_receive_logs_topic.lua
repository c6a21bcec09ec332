-- Topics: listens by patterns; * is one word, # any number of them.
--   lua examples/tutorial5_receive_logs_topic.lua "kern.*" "*.critical"   (MESSAGES=1 ends it after one line)
local moonrabbit = require "moonrabbit"
io.stdout:setvbuf "line"

if #arg == 0 then
  io.stderr:write("Usage: ", arg[0], " PATTERN...\n")
  os.exit(1)
end
local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
local ch = assert(conn:channel())
assert(ch:exchange_declare("topic_logs", { type = "topic" }))
local queue = assert(ch:queue_declare("", { exclusive = true })).queue
for _, pattern in ipairs(arg) do assert(ch:queue_bind(queue, "topic_logs", pattern)) end

local left = tonumber(os.getenv "MESSAGES" or math.huge)
local consumer = assert(ch:consume(queue, { no_ack = true }))
print " [*] Waiting for logs. To exit press CTRL+C"
for msg in consumer:messages() do
  print((" [x] '%s':'%s'"):format(msg.routing_key, msg.body))
  left = left - 1
  if left <= 0 then break end
end
conn:close()
