-- RPC, the client: asks for a Fibonacci number and waits for the answer.
--   lua examples/tutorial6_rpc_client.lua [N]
local moonrabbit = require "moonrabbit"

local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))

local n = arg[1] or "30"
print(" [x] Requesting fib(" .. n .. ")")
-- Over direct reply-to: no queue for the answers has to be declared. No server is an error at once.
local answer = assert(conn:call(n, { routing_key = "rpc_queue", timeout = 10 }))
print(" [.] Got " .. answer.body)
conn:close()
