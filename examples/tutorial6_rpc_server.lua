-- RPC, the server: answers with Fibonacci numbers.
--   lua examples/tutorial6_rpc_server.lua       (MESSAGES=1 ends it after one request)
local moonrabbit = require "moonrabbit"
io.stdout:setvbuf "line"

local function fib(n)
  if n < 2 then return n end
  return fib(n - 1) + fib(n - 2)
end

local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
local ch = assert(conn:channel { prefetch = 1 })
assert(ch:queue_declare("rpc_queue", { durable = true }))

local left = tonumber(os.getenv "MESSAGES" or math.huge)
local consumer = assert(ch:consume "rpc_queue")
print " [x] Awaiting RPC requests"
for msg in consumer:messages() do
  local n = tonumber(msg.body)
  if n and n >= 0 and n <= 30 then
    print(" [.] fib(" .. msg.body .. ")")
    assert(msg:reply(("%d"):format(fib(math.floor(n)))))
  else
    assert(msg:reply "a number from 0 to 30, please")
  end
  msg:ack()
  left = left - 1
  if left <= 0 then break end
end
conn:close()
