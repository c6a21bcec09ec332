-- Work Queues: hands out a task. Every dot in it takes a worker a second.
--   lua examples/tutorial2_new_task.lua Third message...
local moonrabbit = require "moonrabbit"

local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
local ch = assert(conn:channel { confirm = true })
assert(ch:queue_declare("task_queue", { durable = true }))

local task = #arg > 0 and table.concat(arg, " ") or "Hello World!"
assert(ch:publish(task, { routing_key = "task_queue" })) -- persistent: survives a restart of the broker
print(" [x] Sent '" .. task .. "'")
conn:close()
