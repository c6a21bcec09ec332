-- Topics: a log line with a routing key of words, facility.severity.
--   lua examples/tutorial5_emit_log_topic.lua kern.critical A critical kernel error
local moonrabbit = require "moonrabbit"

local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
local ch = assert(conn:channel { confirm = true })
assert(ch:exchange_declare("topic_logs", { type = "topic" }))

local key = arg[1] or "anonymous.info"
local message = #arg > 1 and table.concat(arg, " ", 2) or "Hello World!"
assert(ch:publish(message, { exchange = "topic_logs", routing_key = key, mandatory = false }))
print((" [x] Sent '%s':'%s'"):format(key, message))
conn:close()
