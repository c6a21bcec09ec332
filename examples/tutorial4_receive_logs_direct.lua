-- Routing: listens to the severities named.
--   lua examples/tutorial4_receive_logs_direct.lua warning error     (MESSAGES=1 ends it after one line)
local moonrabbit = require "moonrabbit"
io.stdout:setvbuf "line"

if #arg == 0 then
  io.stderr:write("Usage: ", arg[0], " [info] [warning] [error]\n")
  os.exit(1)
end
local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
local ch = assert(conn:channel())
assert(ch:exchange_declare("direct_logs", { type = "direct" }))
local queue = assert(ch:queue_declare("", { exclusive = true })).queue
for _, severity in ipairs(arg) do assert(ch:queue_bind(queue, "direct_logs", severity)) end

local left = tonumber(os.getenv "MESSAGES" or math.huge)
local consumer = assert(ch:consume(queue, { no_ack = true }))
print " [*] Waiting for logs. To exit press CTRL+C"
for msg in consumer:messages() do
  print((" [x] '%s':'%s'"):format(msg.routing_key, msg.body))
  left = left - 1
  if left <= 0 then break end
end
conn:close()
