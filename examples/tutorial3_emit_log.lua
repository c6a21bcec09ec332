-- Publish/Subscribe: a log line for everybody who listens.
--   lua examples/tutorial3_emit_log.lua [MESSAGE]
local moonrabbit = require "moonrabbit"

local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
local ch = assert(conn:channel { confirm = true })
assert(ch:exchange_declare("logs", { type = "fanout" }))

local message = #arg > 0 and table.concat(arg, " ") or "info: Hello World!"
-- Not mandatory: when nobody listens, the line is nobody's.
assert(ch:publish(message, { exchange = "logs", mandatory = false }))
print(" [x] Sent '" .. message .. "'")
conn:close()
