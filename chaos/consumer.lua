--- The consumer of the harness: writes every delivery into its ledger, and acks it then. SIGTERM ends it.
local native = require "moonrabbit.runtime.native"
local worker = require "chaos.worker"

worker.run(function(plan, queue, stopping)
  local conn = worker.connect(plan, queue)
  local channel = assert(conn:channel { prefetch = 50 })
  channel:on("cancel", function() plan.book:write("event", queue, 0, "cancelled") end)
  channel:on("close", function(err) plan.book:write("event", queue, 0, "channel_closed " .. tostring(err)) end)
  assert(channel:consume(queue, function(msg)
    plan.book:write("delivered", queue, tonumber((msg.body:match "^%S+ (%d+)")),
      msg.redelivered and "again" or "")
    msg:ack()
  end))
  while not stopping() do native.sleep(0.05) end
  conn:close(5)
end)
