-- Routing: a log line with its severity as the routing key.
--   lua examples/tutorial4_emit_log_direct.lua [SEVERITY [MESSAGE]]
local moonrabbit = require "moonrabbit"

local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
local ch = assert(conn:channel { confirm = true })
assert(ch:exchange_declare("direct_logs", { type = "direct" }))

local severity = arg[1] or "info"
local message = #arg > 1 and table.concat(arg, " ", 2) or "Hello World!"
assert(ch:publish(message, { exchange = "direct_logs", routing_key = severity, mandatory = false }))
print((" [x] Sent '%s':'%s'"):format(severity, message))
conn:close()
