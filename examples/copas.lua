-- moonrabbit among the threads of Copas: one publishes, one serves TCP, handlers consume.
--   lua examples/copas.lua [MESSAGES]
local copas = require "copas"
local socket = require "socket"
local moonrabbit = require("moonrabbit").on "copas"

local count = tonumber(arg[1] or 10)
local done = false

-- A server of the user's own: it answers while moonrabbit works.
local server = assert(socket.bind("127.0.0.1", 0))
local _, port = server:getsockname()
copas.addserver(server, function(client)
  copas.send(client, "hello\n")
  client:close()
end)

copas.addthread(function()
  local conn = assert(moonrabbit.connect(os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"))
  local ch = assert(conn:channel { confirm = true })
  local queue = assert(ch:queue_declare("", { exclusive = true })).queue
  local handled = 0
  assert(conn:consume(queue, { concurrency = 5 }, function(msg)
    moonrabbit.sleep(0.01) -- Copas 1 has no sleep of its own
    msg:ack()
    handled = handled + 1
  end))
  for i = 1, count do assert(ch:publish("message " .. i, { routing_key = queue })) end
  while handled < count do moonrabbit.sleep(0.01) end
  print((" [x] Published and handled %d messages"):format(count))
  local client = socket.tcp()
  assert(copas.connect(client, "127.0.0.1", port))
  print(" [.] The server says " .. assert(copas.receive(client)))
  client:close()
  assert(conn:close())
  done = true
end)

while not done do copas.step() end -- as copas.loop(), with an end
