--- A network that can be made to fail: TCP links to brokers, in a process of their own.
--
--     lua5.4 links.lua HOST:PORT…
--
-- prints the port of its control connection and those of the links, in one line. On a control connection each
-- line is a command, answered with "ok":
--
-- * `pass N`         link N carries everything, at once
-- * `silent N`       it carries nothing and tells nobody: what is sent waits, as if packets were dropped
-- * `swallow N`      it takes everything from the client's side and throws it away
-- * `delay N S`      everything arrives S seconds late
-- * `cut N`          its connections are closed
-- * `tear N`         a part of the next frame passes, then its connections are reset
-- * `refuse N`       new connections are closed at once, and those that are there are cut
local native = require "moonrabbit.runtime.native"

local Link = {}
Link.__index = Link

local function new_link(host, port)
  return setmetatable({ host = host, port = port, mode = "pass", delay = 0, lines = {}, changed = native.condition() },
    Link)
end

local function close(line)
  line.closed = true
  line.client:close()
  line.upstream:close()
  line.more:broadcast()
end

-- A part of the bytes leaves. What the peer sends meanwhile is not read: with unread bytes a close is a reset.
local function tear(line, bytes, to)
  line.torn = true
  to:write(bytes:sub(1, math.max(1, #bytes // 2)), 1)
  native.sleep(0.05)
  close(line)
end

-- Takes bytes off one side and gives them to the queue of the other.
local function take(link, line, from, queue, to, is_client)
  while not line.closed do
    local bytes = from:read(65536)
    if not bytes then break end
    while link.mode == "silent" and not line.closed do link.changed:wait(1) end
    if line.torn then return end
    if link.mode == "tear" then return tear(line, bytes, to) end
    if not (link.mode == "swallow" and is_client) then
      queue[#queue + 1] = { at = native.now() + link.delay, bytes = bytes }
      line.more:broadcast()
    end
  end
  queue.over = true
  line.more:broadcast()
end

-- Delivers what is in a queue, each at its time.
local function give(link, line, queue, to)
  while not line.closed do
    local first = queue[1]
    if not first then
      if queue.over then break end
      line.more:wait(1)
    elseif first.at > native.now() then
      native.sleep(first.at - native.now())
    elseif link.mode == "silent" then
      link.changed:wait(1)
    else
      table.remove(queue, 1)
      if not to:write(first.bytes) then break end
    end
  end
  if not line.torn then close(line) end
end

function Link:join(client)
  if self.mode == "refuse" then return client:close() end
  while self.mode == "silent" do self.changed:wait(1) end
  local upstream = native.open({ host = self.host, port = self.port }, nil, 5)
  if not upstream then return client:close() end
  local line = { client = client, upstream = upstream, more = native.condition(), closed = false }
  self.lines[#self.lines + 1] = line
  local there, back = {}, {}
  native.spawn(take, self, line, client, there, upstream, true)
  native.spawn(take, self, line, upstream, back, client, false)
  native.spawn(give, self, line, there, upstream)
  native.spawn(give, self, line, back, client)
end

function Link:cut()
  for _, line in ipairs(self.lines) do close(line) end
  self.lines = {}
end

local function accept(link, server)
  while true do
    local client = server:accept()
    if client then native.spawn(link.join, link, client) end
  end
end

-- ---- Control ------------------------------------------------------------------------------------------------

local links = {}

local function obey(command)
  local verb, number, value = command:match "^(%a+)%s+(%d+)%s*(%S*)"
  local link = links[tonumber(number)]
  if not link then return "no such link" end
  if verb == "cut" then
    link:cut()
  elseif verb == "delay" then
    link.delay = tonumber(value)
  elseif verb == "pass" or verb == "silent" or verb == "swallow" or verb == "tear" or verb == "refuse" then
    link.mode = verb
    if verb == "pass" then link.delay = 0 end
    if verb == "refuse" then link:cut() end
    link.changed:broadcast()
  else
    return "no such command"
  end
  return "ok"
end

local function serve(control)
  local rest = ""
  while true do
    local bytes = control:read(4096)
    if not bytes then break end
    rest = rest .. bytes
    for line in rest:gmatch "([^\n]*)\n" do control:write(obey(line) .. "\n") end
    rest = rest:match "[^\n]*$"
  end
  control:close()
end

native.run(function()
  local ports = {}
  for i, target in ipairs(arg) do
    local host, port = target:match "^(.*):(%d+)$"
    local server = assert(native.listen("127.0.0.1", 0))
    links[i] = new_link(host, tonumber(port))
    ports[i] = server:port()
    native.spawn(accept, links[i], server)
  end
  local control = assert(native.listen("127.0.0.1", 0))
  print(control:port(), table.unpack(ports))
  io.stdout:flush()
  while true do
    local connection = control:accept()
    if connection then native.spawn(serve, connection) end
  end
end)
