-- One coroutine that waits for a socket of its own and for a queue at once: consumers are objects that cqueues.poll takes.
-- What is written to the socket is published, what comes from the queue is printed.
--   lua examples/cqueues_poll.lua [LINES]
local cqueues = require "cqueues"
local socket = require "cqueues.socket"
local moonrabbit = require("moonrabbit").on "cqueues"

local count = tonumber(arg[1] or 5)
local cq = cqueues.new()
local near, far = socket.pair()
local readable = { pollfd = near:pollfd(), events = "r" } -- a socket itself says what its last call waits for

cq:wrap(function()
  for i = 1, count do
    far:write("line " .. i .. "\n")
    far:flush()
    cqueues.sleep(0.01)
  end
end)

cq:wrap(function()
  local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
  local ch = assert(conn:channel { confirm = true })
  local queue = assert(ch:queue_declare("", { exclusive = true })).queue
  local consumer = assert(ch:consume(queue))
  local printed = 0
  while printed < count do
    local ready = cqueues.poll(readable, consumer, 5)
    if ready == readable then
      repeat -- what the socket has read ahead is no longer in its descriptor
        assert(ch:publish(near:read "*l", { routing_key = queue }))
      until near:pending() == 0
    elseif ready == consumer then
      local message = assert(consumer:receive(0)) -- it is there: nothing waits
      print(" [x] " .. message.body)
      message:ack()
      printed = printed + 1
    else
      error "nothing came within 5 s"
    end
  end
  assert(conn:close())
end)

assert(cq:loop())
