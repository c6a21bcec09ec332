-- Hello World, the receiver: prints what comes to the queue "hello".
--   lua examples/tutorial1_receive.lua          (MESSAGES=1 ends it after one message)
local moonrabbit = require "moonrabbit"
io.stdout:setvbuf "line"

local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
local ch = assert(conn:channel())
assert(ch:queue_declare("hello", { durable = true }))

local left = tonumber(os.getenv "MESSAGES" or math.huge)
local consumer = assert(ch:consume "hello")
print " [*] Waiting for messages. To exit press CTRL+C"
for msg in consumer:messages() do
  print(" [x] Received '" .. msg.body .. "'")
  msg:ack()
  left = left - 1
  if left <= 0 then break end
end
conn:close()
