-- moonrabbit in a cqueue, beside coroutines of the user's own: one publishes, one ticks, handlers consume.
--   lua examples/cqueues.lua [MESSAGES]
local cqueues = require "cqueues"
local moonrabbit = require("moonrabbit").on "cqueues"

local count = tonumber(arg[1] or 10)
local cq = cqueues.new()
local done = false

-- Any coroutine of the cqueue may call what waits; the connection belongs to this cqueue.
cq:wrap(function()
  local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
  local ch = assert(conn:channel { confirm = true })
  local queue = assert(ch:queue_declare("", { exclusive = true })).queue
  local handled = 0
  assert(conn:consume(queue, { concurrency = 5 }, function(msg)
    cqueues.sleep(0.01) -- handlers are coroutines of the cqueue too
    msg:ack()
    handled = handled + 1
  end))
  for i = 1, count do assert(ch:publish("message " .. i, { routing_key = queue })) end
  while handled < count do moonrabbit.sleep(0.01) end
  print((" [x] Published and handled %d messages"):format(count))
  assert(conn:close())
  done = true
end)

cq:wrap(function()
  local ticks = 0
  while not done do
    cqueues.sleep(0.005)
    ticks = ticks + 1
  end
  print(ticks > 0 and " [.] The other coroutine ran meanwhile" or " [!] Something blocked the loop")
end)

assert(cq:loop())
