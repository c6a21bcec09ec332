-- Hello World, the sender: one message to the queue "hello".
--   lua examples/tutorial1_send.lua [MESSAGE]
local moonrabbit = require "moonrabbit"

local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
local ch = assert(conn:channel { confirm = true })
assert(ch:queue_declare("hello", { durable = true }))

local body = arg[1] or "Hello World!"
assert(ch:publish(body, { routing_key = "hello" })) -- returns once the broker has it in the queue
print(" [x] Sent '" .. body .. "'")
conn:close()
