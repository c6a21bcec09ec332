-- moonrabbit under uv.run, beside a timer of the user's own.
--   lua examples/luv.lua [MESSAGES]
local uv = require "luv"
local moonrabbit = require("moonrabbit").on "luv"

local count = tonumber(arg[1] or 10)

local ticks, timer = 0, uv.new_timer()
timer:start(5, 5, function() ticks = ticks + 1 end)

-- Callbacks cannot wait: coroutines can, and `spawn` starts one (in a callback too).
moonrabbit.spawn(function()
  local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
  local ch = assert(conn:channel { confirm = true })
  local queue = assert(ch:queue_declare("", { exclusive = true })).queue
  local handled = 0
  assert(conn:consume(queue, { concurrency = 5 }, function(msg)
    moonrabbit.sleep(0.01)
    msg:ack()
    handled = handled + 1
  end))
  for i = 1, count do assert(ch:publish("message " .. i, { routing_key = queue })) end
  while handled < count do moonrabbit.sleep(0.01) end
  print((" [x] Published and handled %d messages"):format(count))
  print(ticks > 0 and " [.] The timer ticked meanwhile" or " [!] Something blocked the loop")
  assert(conn:close())
  timer:close()
end)

uv.run() -- returns, for nothing is open any more
