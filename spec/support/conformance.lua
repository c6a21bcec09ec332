--- What every runtime must do: a list of cases, `{ name, fn, needs = {...} }`. Each `fn(t)` runs in a task
--- of the runtime and throws when something is wrong. Plain Lua, so that nginx can run it too.
--
-- `t` is what the harness gives:
--
-- * `rt`: the runtime (docs/internals.md)
-- * `moonrabbit`: connect, spawn, sleep, pcall for it
-- * `url`: of a broker                                          needs "broker"
-- * `tls`: { host, port, url, ca } of a broker; ca: a file, nil where the runtime is told otherwise   needs "tls"
-- * `lines`: the port of a process of spec/support/lines.lua    needs "lines"
-- * `listen`: true where rt.listen is there                     needs "listen"; with `lines` in its place: "peer"
-- * `mute_names(given_up)`: makes the resolver silent until the function that it returns is called; a question that
--   is taken back calls given_up
-- * `idle_turns`: what the loop turns a second by itself, nil: not at all
-- * `write_is_deaf`: true where closing does not end a write
-- * `wakes`: how often a heartbeat may wake it; 1 by default
-- * `errors`: the texts that rt.on_error was given; a case empties it
--
-- `conformance.run(t, report, wanted)` runs them one after another and returns { { name, "ok"|"skipped"|text } … }.

local conformance = {}

local cases = {}

local function case(name, needs, fn)
  cases[#cases + 1] = { name = name, needs = needs, fn = fn }
end

local function eventually(t, what, fn, seconds)
  local deadline = t.rt.now() + (seconds or 20)
  while not fn() do
    if t.rt.now() > deadline then error("it never happens: " .. what, 2) end
    t.rt.sleep(0.005)
  end
end

local function equal(expected, found, what)
  if expected ~= found then
    error(("%s: expected %s, found %s"):format(what or "value", tostring(expected), tostring(found)), 2)
  end
end

local function has(text, part)
  if not tostring(text):find(part, 1, true) then error(("'%s' lacks '%s'"):format(tostring(text), part), 2) end
end

-- ---- Tasks ----------------------------------------------------------------------------------------------------------

case("tasks start at the next turn, with their arguments", {}, function(t)
  local seen = {}
  t.rt.spawn(function(...) seen[#seen + 1] = select("#", ...) .. tostring((...)) end, "a", nil, nil)
  seen[#seen + 1] = "spawned"
  eventually(t, "it ran", function() return #seen == 2 end)
  equal("spawned 3a", table.concat(seen, " "))
end)

case("tasks know themselves", {}, function(t)
  local me, other, known = t.rt.current(), nil, 0
  assert(me, "there is no current task")
  other = t.rt.spawn(function()
    if t.rt.current() == other then known = known + 1 end
    t.rt.sleep(0.001)
    if t.rt.current() == other then known = known + 1 end
  end)
  eventually(t, "it ran", function() return known == 2 end)
  equal(me, t.rt.current(), "the current task")
  assert(me ~= other)
end)

case("errors in tasks are reported with a traceback, and the others go on", {}, function(t)
  local done = false
  t.rt.spawn(function() error "first failure" end)
  t.rt.spawn(function()
    t.rt.sleep(0.001)
    error(setmetatable({}, { __tostring = function() return "an object" end }))
  end)
  t.rt.spawn(function()
    t.rt.sleep(0.01)
    done = true
  end)
  eventually(t, "both are reported", function() return done and #t.errors == 2 end)
  has(t.errors[1], "first failure")
  has(t.errors[1], "conformance.lua")
  has(t.errors[1], "stack traceback")
  has(t.errors[2], "an object")
  t.errors[1], t.errors[2] = nil, nil
end)

case("an error object that cannot tell what it is is reported too, and the others go on", {}, function(t)
  local done = false
  local function object(tell) return setmetatable({}, { __tostring = tell }) end
  t.rt.spawn(function() error(object(function() error "it cannot tell" end)) end)
  t.rt.spawn(function() error(object(function() return {} end)) end)
  t.rt.spawn(function() error() end)
  t.rt.spawn(function()
    t.rt.sleep(0.01)
    done = true
  end)
  eventually(t, "all are reported", function() return done and #t.errors == 3 end)
  for i = 3, 1, -1 do
    equal("string", type(t.errors[i]), "what is reported")
    t.errors[i] = nil
  end
end)

case("10,000 tasks sleep and wait side by side", {}, function(t)
  local rt, many = t.rt, t.many or 10000
  local condition, woken, slept = rt.condition(), 0, 0
  for i = 1, many do
    rt.spawn(function()
      if i % 2 == 0 then
        if condition:wait(60) then woken = woken + 1 end
      else
        rt.sleep(0.05)
        slept = slept + 1
      end
    end)
  end
  eventually(t, "half of them slept", function() return slept == many / 2 end, 60)
  condition:broadcast()
  eventually(t, "the others were woken", function() return woken == many / 2 end, 60)
end)

case("spawn wants a function, sleep a number", {}, function(t)
  assert(not pcall(t.rt.spawn, nil), "spawn(nil)")
  assert(not t.moonrabbit.pcall(t.rt.sleep, "x"), "sleep 'x'")
end)

case("a protected call may wait", {}, function(t)
  local ok, err = t.moonrabbit.pcall(function()
    t.rt.sleep(0.001)
    error("boom", 0)
  end)
  equal(false, ok)
  equal("boom", err)
end)

-- ---- Time -----------------------------------------------------------------------------------------------------------

-- The order in which three sleepers woke, how many too early, and by how much the latest was late.
local function sleepers(t)
  local rt, order, early, late = t.rt, {}, 0, 0
  for _, seconds in ipairs { 0.12, 0.04, 0.08 } do
    rt.spawn(function()
      local began = rt.now()
      rt.sleep(seconds)
      local slept = rt.now() - began
      if slept < seconds - 0.002 then early = early + 1 end
      late = math.max(late, slept - seconds)
      order[#order + 1] = seconds
    end)
  end
  eventually(t, "all woke", function() return #order == 3 end)
  return table.concat(order, " "), early, late
end

case("sleepers wake in the order of their times, none too early", {}, function(t)
  local order, early, late
  local tries = 0
  repeat -- where the machine stood still, two were due at once, in no order
    tries = tries + 1
    order, early, late = sleepers(t)
    equal(0, early, "too early")
  until order == "0.04 0.08 0.12" or late < 0.03 or tries == 20
  equal("0.04 0.08 0.12", order)
end)

case("sleep(0) lets the others run", {}, function(t)
  local turns = 0
  t.rt.spawn(function() turns = turns + 1 end)
  for _ = 1, 1000 do
    if turns == 1 then break end
    t.rt.sleep(0)
  end
  equal(1, turns)
end)

-- ---- Conditions -----------------------------------------------------------------------------------------------------

case("a signal wakes the one that waited longest, a broadcast all", {}, function(t)
  local rt, condition, woken = t.rt, t.rt.condition(), {}
  for i = 1, 4 do
    rt.spawn(function()
      assert(condition:wait(20))
      woken[#woken + 1] = i
    end)
    rt.sleep(0.002)
  end
  rt.sleep(0.01)
  condition:signal()
  eventually(t, "the first woke", function() return #woken == 1 end)
  rt.sleep(0.01)
  equal(1, #woken)
  condition:broadcast()
  eventually(t, "all woke", function() return #woken == 4 end)
  equal(1, woken[1])
end)

case("a wait ends at its timeout, and tells so", {}, function(t)
  local condition, began = t.rt.condition(), t.rt.now()
  equal(false, condition:wait(0.03))
  assert(t.rt.now() - began >= 0.028, "too early")
  equal(false, condition:wait(0))
  equal(false, condition:wait(-0.001)) -- a deadline passes between two looks at the clock
  equal(false, condition:wait(-20))
end)

case("a signal that nobody waits for is not kept", {}, function(t)
  local condition = t.rt.condition()
  condition:signal()
  condition:broadcast()
  equal(false, condition:wait(0.02))
end)

case("a waiter whose time is over takes no signal from the next", {}, function(t)
  local rt, condition, woken = t.rt, t.rt.condition(), 0
  equal(false, condition:wait(0.01))
  rt.spawn(function() if condition:wait(20) then woken = woken + 1 end end)
  rt.sleep(0.01)
  condition:signal()
  eventually(t, "it woke", function() return woken == 1 end)
end)

-- ---- Cancelling -----------------------------------------------------------------------------------------------------

case("a cancelled task ends in its wait, quietly", {}, function(t)
  local rt, condition, reached, ended = t.rt, t.rt.condition(), 0, 0
  local function wait_in(fn)
    return rt.spawn(function()
      local ok, err = t.moonrabbit.pcall(fn)
      if ok then reached = reached + 1 end
      if not ok and err == rt.cancelled then ended = ended + 1 end
      error(err, 0)
    end)
  end
  local tasks = { wait_in(function() condition:wait() end), wait_in(function() rt.sleep(60) end) }
  rt.sleep(0.01)
  for _, task in ipairs(tasks) do rt.cancel(task) end
  eventually(t, "they ended", function() return ended == #tasks end)
  equal(0, reached)
  local other = false
  rt.spawn(function() other = condition:wait(20) end)
  rt.sleep(0.01)
  condition:signal()
  eventually(t, "the signal went to the next", function() return other end)
end)

case("a task cancels itself, and before it runs: its next wait throws, and no other", {}, function(t)
  local rt, waits, began = t.rt, {}, t.rt.now()
  local function wait_of(name, fn, ...)
    local ok, err = t.moonrabbit.pcall(fn, ...)
    waits[name] = ok and "waited" or err == rt.cancelled and "cancelled" or tostring(err)
  end
  rt.cancel(rt.current())
  wait_of("its own", rt.sleep, 60)
  wait_of("the next", rt.sleep, 0.02)
  assert(rt.now() - began >= 0.018, "too early")
  local task = rt.spawn(function()
    wait_of("a condition", function() rt.condition():wait(60) end)
    wait_of("a condition's next", function() rt.condition():wait(0.001) end)
  end)
  rt.cancel(task)
  rt.cancel(task) -- which is once
  eventually(t, "it ended", function() return waits["a condition's next"] end)
  equal("cancelled", waits["its own"], "its own")
  equal("waited", waits["the next"], "the next")
  equal("cancelled", waits["a condition"], "a condition")
  equal("waited", waits["a condition's next"], "a condition's next")
end)

case("a task that is over is left alone, whatever runs where it ran", {}, function(t)
  local rt, ended, woken = t.rt, 0, 0
  local old = {}
  for i = 1, 10 do old[i] = rt.spawn(function() ended = ended + 1 end) end
  eventually(t, "they ended", function() return ended == 10 end)
  local condition = rt.condition()
  for _ = 1, 10 do rt.spawn(function() if condition:wait(20) then woken = woken + 1 end end) end
  rt.sleep(0.01)
  for _, task in ipairs(old) do rt.cancel(task) end
  rt.sleep(0.01)
  condition:broadcast()
  eventually(t, "the others were woken", function() return woken == 10 end)
end)

case("a wait may be as long as there are numbers, and be cancelled all the same", {}, function(t)
  local rt, ended, tasks = t.rt, {}, {}
  for i, fn in ipairs {
    function() rt.sleep(math.huge) end,
    function() rt.sleep(1e300) end,
    function() rt.condition():wait(math.huge) end,
  } do
    tasks[i] = rt.spawn(function()
      local ok, err = t.moonrabbit.pcall(fn)
      ended[#ended + 1] = ok and "waited" or err == rt.cancelled and "cancelled" or tostring(err)
    end)
  end
  rt.sleep(0.02)
  equal(nil, ended[1], "ended before")
  for _, task in ipairs(tasks) do rt.cancel(task) end
  eventually(t, "they ended", function() return #ended == 3 end)
  equal("cancelled cancelled cancelled", table.concat(ended, " "))
  rt.sleep(-1)
  rt.sleep(-math.huge)
end)

-- ---- Peers: a server and what it does with the first that connects ----------------------------------------------------

local function send_back(far)
  while true do
    local bytes = far:read(65536)
    if not bytes or not far:write(bytes) then break end
  end
  far:close()
end

-- In this process.
local function own_peer(t, host, path)
  local server
  if path then server = t.rt.listen(path) else server = t.rt.listen(host, 0) end
  if not server then return nil end
  local far, echoing
  t.rt.spawn(function()
    far = server:accept()
    if far and echoing then send_back(far) end
  end)
  local function arrived() eventually(t, "it is connected", function() return far end) end
  return {
    port = server:port(),
    echo = function() echoing = true end,
    say = function(text)
      arrived()
      assert(far:write(text))
    end,
    hang_up = function()
      arrived()
      far:close()
    end,
    arrived = arrived,
    ended = function()
      arrived()
      while far:read() do end
    end,
    close = function()
      server:close()
      if far then far:close() end
    end,
  }
end

-- In the process of spec/support/lines.lua.
local function other_peer(t, host, path)
  local control = assert(t.rt.open({ host = "127.0.0.1", port = t.lines }, nil, 10))
  local port = tonumber((assert(control:read(64, 10)):match "%d+"))
  local function ask(word)
    assert(control:write(word .. "\n"))
    return tonumber((assert(control:read(64, 20)):match "%d+"))
  end
  ask "alone"
  if host == "::1" then port = ask "six" end
  if path then ask("unix " .. path) end
  if port == 0 then return nil end
  return {
    port = port,
    echo = function() ask "echo" end, say = function(text) ask("say " .. text) end, hang_up = function() ask "cut" end,
    later = function(text) ask("later " .. text) end,
    arrived = function() eventually(t, "it is connected", function() return ask "arrived" > 0 end) end,
    ended = function() ask "ended" end,
    close = function() control:close() end,
  }
end

--- A peer that takes one connection and does what it is told: { port, echo() before it is connected to, say(text),
--- hang_up(), arrived() returns when it is connected to, ended() when that is closed from here, close() }. nil: there
--- is no IPv6.
local function new_peer(t, host, path) return (t.listen and own_peer or other_peer)(t, host or "127.0.0.1", path) end

local function connected(t, peer) return assert(t.rt.open({ host = "127.0.0.1", port = peer.port }, nil, 5)) end

-- ---- Cancelling what waits for the network ---------------------------------------------------------------------------

case("a task cancelled while it connects leaves nothing", { "peer" }, function(t)
  local rt, ended = t.rt, false
  local peer = new_peer(t)
  local task = rt.spawn(function()
    local _, err = t.moonrabbit.pcall(rt.open, { host = "127.0.0.1", port = peer.port }, { verify = false }, 60)
    ended = err == rt.cancelled
  end)
  peer.arrived()
  rt.cancel(task)
  eventually(t, "it ended", function() return ended end)
  peer.ended()
  peer.close()
end)

case("a task cancelled while it reads ends there, and the connection stays", { "peer" }, function(t)
  local rt, ended = t.rt, false
  local peer = new_peer(t)
  local near = connected(t, peer)
  local task = rt.spawn(function()
    local _, err = t.moonrabbit.pcall(near.read, near)
    ended = err == rt.cancelled
  end)
  rt.sleep(0.02)
  rt.cancel(task)
  eventually(t, "it ended", function() return ended end)
  peer.say "after"
  equal("after", near:read(100, 5))
  near:close()
  peer.close()
end)

case("a task cancelled while it writes or accepts ends there", { "listen" }, function(t)
  local rt, ended = t.rt, 0
  local server = assert(rt.listen("127.0.0.1", 0))
  local near
  rt.spawn(function() near = assert(rt.open({ host = "127.0.0.1", port = server:port() }, nil, 5)) end)
  local far = assert(server:accept())
  eventually(t, "connected", function() return near end)
  local tasks = {}
  for i, fn in ipairs {
    function() near:write(("x"):rep(32 * 1024 * 1024)) end,
    function() server:accept() end,
  } do
    tasks[i] = rt.spawn(function()
      local _, err = t.moonrabbit.pcall(fn)
      if err == rt.cancelled then ended = ended + 1 end
    end)
  end
  rt.sleep(0.02)
  for _, task in ipairs(tasks) do rt.cancel(task) end
  eventually(t, "they ended", function() return ended == 2 end)
  near:close()
  far:close()
  server:close()
end)

-- ---- Opening --------------------------------------------------------------------------------------------------------

case("a port that nobody listens on refuses", {}, function(t)
  local transport, kind, text, temporary = t.rt.open({ host = "127.0.0.1", port = 1 }, nil, 5)
  equal(nil, transport)
  equal("refused", kind)
  equal(true, temporary)
  assert(#text > 0)
end)

case("a name that is none is not found", {}, function(t)
  local transport, kind, text = t.rt.open({ host = "no-such-host.invalid", port = 5672 }, nil, 20)
  equal(nil, transport)
  equal("dns", kind, text)
end)

case("a peer that says nothing to a TLS handshake is given up in time", { "peer" }, function(t)
  local peer = new_peer(t)
  local transport, kind, text, temporary = t.rt.open({ host = "127.0.0.1", port = peer.port }, {}, 1)
  equal(nil, transport)
  equal("timeout", kind)
  equal(true, temporary)
  has(text, "TLS handshake")
  peer.ended()
  peer.close()
end)

case("a resolver that does not answer is given up in time, or with its task", { "mute_names" }, function(t)
  local rt, ended, given_up = t.rt, nil, 0
  local restore = t.mute_names(function() given_up = given_up + 1 end)
  local transport, kind, text, temporary = rt.open({ host = "slow.example", port = 1 }, nil, 0.02)
  local task = rt.spawn(function()
    local _, err = t.moonrabbit.pcall(rt.open, { host = "slow.example", port = 1 }, nil, 60)
    ended = err
  end)
  rt.sleep(0.01)
  rt.cancel(task)
  eventually(t, "it ended", function() return ended end)
  restore()
  equal(nil, transport)
  equal("timeout", kind)
  equal(true, temporary)
  has(text, "slow.example")
  equal(rt.cancelled, ended)
  equal(2, given_up, "questions that were taken back")
end)

local function talks(t, peer, endpoint)
  peer.echo()
  local transport = assert(t.rt.open(endpoint, nil, 5))
  assert(transport:write "hello")
  equal("hello", transport:read(100, 5))
  transport:close()
  peer.close()
end

case("unix sockets", { "peer" }, function(t)
  local path = os.tmpname()
  os.remove(path)
  talks(t, new_peer(t, nil, path), { path = path })
  os.remove(path)
end)

case("IPv6, and localhost", { "peer" }, function(t)
  local peer = new_peer(t, "::1")
  if peer then talks(t, peer, { host = "::1", port = peer.port }) end
  peer = new_peer(t)
  talks(t, peer, { host = "localhost", port = peer.port })
end)

-- ---- Transports -----------------------------------------------------------------------------------------------------

case("eight megabytes go there and back", { "peer" }, function(t)
  local peer = new_peer(t)
  peer.echo()
  local near = connected(t, peer)
  local chunk = ("0123456789abcdef"):rep(65536)
  t.rt.spawn(function() for _ = 1, 8 do assert(near:write(chunk)) end end)
  local parts, n = {}, 0
  while n < 8 * #chunk do
    local bytes = assert(near:read(65536, 20))
    parts[#parts + 1], n = bytes, n + #bytes
  end
  equal(true, table.concat(parts) == chunk:rep(8), "the same bytes")
  near:close()
  peer.close()
end)

case("a read ends at its timeout, and the next one reads", { "peer" }, function(t)
  local peer = new_peer(t)
  local near = connected(t, peer)
  local bytes, kind = near:read(10, 0.02)
  equal(nil, bytes)
  equal("timeout", kind)
  peer.say "late"
  equal("late", near:read(10, 5))
  peer.hang_up()
  bytes, kind = near:read(10, 5)
  equal(nil, bytes)
  equal("closed", kind)
  near:close()
  peer.close()
end)

case("a peer that does not read holds the writer back, not the others", { "peer" }, function(t)
  local peer, ticks, result = new_peer(t), 0, nil
  local near = connected(t, peer)
  t.rt.spawn(function() result = { near:write(("x"):rep(32 * 1024 * 1024), 2) } end)
  while ticks < 20 and not result do
    t.rt.sleep(0.005)
    ticks = ticks + 1
  end
  assert(not result, "the others stood still")
  eventually(t, "it gave up", function() return result end)
  equal(nil, result[1])
  equal("timeout", result[2])
  local said
  t.rt.spawn(function()
    t.rt.sleep(0.02)
    peer.say "word"
    said = true
  end)
  equal("word", near:read(100, 20)) -- which has to wait
  eventually(t, "it was said", function() return said end)
  near:close()
  peer.close()
end)

case("closing wakes who waits to read and who waits to write", { "peer" }, function(t)
  local peer = new_peer(t)
  local near = connected(t, peer)
  local ends = {}
  t.rt.spawn(function() ends.read = select(2, near:read()) end)
  if t.write_is_deaf then
    ends.write = "closed"
  else
    t.rt.spawn(function() ends.write = select(2, near:write(("x"):rep(32 * 1024 * 1024))) end)
  end
  t.rt.sleep(0.05)
  near:close()
  near:close()
  eventually(t, "both ended", function() return ends.read and ends.write end)
  peer.ended()
  equal("closed", ends.read)
  equal("closed", ends.write)
  equal("closed", select(2, near:read()))
  peer.close()
end)

case("closing wakes nobody who has given up waiting there", { "peer" }, function(t)
  local peer, condition = new_peer(t), t.rt.condition()
  local near = connected(t, peer)
  local waits, gone_on = 0, nil
  t.rt.spawn(function()
    equal("timeout", select(2, near:read(10, 0.01)))
    waits = waits + 1
    gone_on = condition:wait(60)
  end)
  eventually(t, "one gave up", function() return waits == 1 end)
  local task = t.rt.spawn(function()
    t.moonrabbit.pcall(near.read, near)
    waits = waits + 1
    gone_on = condition:wait(60)
  end)
  t.rt.sleep(0.01)
  t.rt.cancel(task)
  eventually(t, "both gave up", function() return waits == 2 end)
  near:close()
  t.rt.sleep(0.02)
  equal(nil, gone_on, "who waits for something else")
  condition:broadcast()
  eventually(t, "they were woken", function() return gone_on end)
  peer.close()
end)

case("there is nothing to do while nobody reads what there is, or writes where there is room", { "peer" }, function(t)
  local peer, written, read = new_peer(t), false, 0
  peer.echo()
  local near = connected(t, peer)
  local size = 16 * 1024 * 1024 -- more than all buffers on the way
  t.rt.spawn(function() written = near:write(("x"):rep(size), 20) end)
  t.rt.sleep(0.05)
  assert(not written, "the write did not have to wait")
  while read < size do read = read + #assert(near:read(1024 * 1024, 20)) end
  eventually(t, "it is written", function() return written end)
  assert(near:write "more") -- which comes back
  t.rt.sleep(0.05)
  local cpu = os.clock()
  t.rt.sleep(0.5)
  cpu = os.clock() - cpu
  assert(cpu < 0.1, ("it used %.2f s of the CPU"):format(cpu))
  equal("more", near:read(100, 5))
  near:close()
  peer.close()
end)

case("tasks that keep one another busy do not keep the network waiting", { "peer" }, function(t)
  local peer, over, turns = new_peer(t), false, 0
  local near = connected(t, peer)
  for _ = 1, 2 do
    t.rt.spawn(function()
      while not over do
        t.rt.sleep(0)
        turns = turns + 1
      end
    end)
  end
  local said
  t.rt.spawn(function()
    eventually(t, "the others turn", function() return turns > 2 end)
    peer.say "word"
    said = true
  end)
  local bytes = near:read(100, 20)
  eventually(t, "it was said", function() return said end)
  over = true
  equal("word", bytes)
  near:close()
  peer.close()
end)

case("a peer that goes without having read what it was sent ends a read", { "peer" }, function(t)
  local peer, kind = new_peer(t), nil
  local near = connected(t, peer)
  peer.arrived()
  assert(near:write "nobody reads this")
  t.rt.spawn(function() kind = select(2, near:read(100, 20)) end)
  t.rt.sleep(0.01)
  peer.hang_up() -- which resets the connection
  eventually(t, "the read ended", function() return kind end)
  equal("closed", kind)
  near:close()
  peer.close()
end)

case("nothing turns while all wait for the network, and nobody for a time", { "lines" }, function(t)
  local peer = other_peer(t, "127.0.0.1")
  local near = connected(t, peer)
  peer.later "word"
  t.rt.sleep(0.001)
  local cpu = os.clock()
  equal("word", near:read(100))
  cpu = os.clock() - cpu
  assert(cpu < 0.1, ("it used %.2f s of the CPU"):format(cpu))
  near:close()
  peer.close()
end)

case("closing a server wakes who accepts", { "listen" }, function(t)
  local server, kind = assert(t.rt.listen("127.0.0.1", 0)), nil
  t.rt.spawn(function() kind = select(2, server:accept()) end)
  t.rt.sleep(0.01)
  server:close()
  eventually(t, "it ended", function() return kind end)
  equal("closed", kind)
end)

case("a server that is forgotten while nobody accepts is in no one's way", { "listen" }, function(t)
  local rt = t.rt
  for _ = 1, 3 do
    local ended
    local task = rt.spawn(function()
      local server = assert(rt.listen("127.0.0.1", 0))
      t.moonrabbit.pcall(server.accept, server)
      ended = true
    end)
    rt.sleep(0.005)
    rt.cancel(task)
    eventually(t, "it ended", function() return ended end)
    task = nil -- luacheck: ignore 311
    collectgarbage()
    collectgarbage() -- and its descriptor is the next one's
    local peer = new_peer(t)
    talks(t, peer, { host = "127.0.0.1", port = peer.port })
  end
end)

-- ---- TLS ------------------------------------------------------------------------------------------------------------

case("TLS: a certificate of the authority for this name is taken", { "tls" }, function(t)
  local transport = assert(t.rt.open({ host = t.tls.host, port = t.tls.port }, { ca = t.tls.ca }, 10))
  has(transport:tls_info(), "TLS")
  transport:close()
end)

case("TLS: another name is not", { "tls" }, function(t)
  local transport, kind, text, temporary = t.rt.open({ host = t.tls.host, port = t.tls.port },
    { ca = t.tls.ca, server_name = "another.example" }, 10)
  equal(nil, transport)
  equal("tls", kind, text)
  equal(false, temporary)
end)

case("TLS: an unknown authority is not", { "tls", "tls_ca" }, function(t)
  local transport, kind, text = t.rt.open({ host = t.tls.host, port = t.tls.port }, {}, 10)
  equal(nil, transport)
  equal("tls", kind, text)
end)

-- ---- With a broker --------------------------------------------------------------------------------------------------

local function options(t, more)
  local all = { uri = t.url, timeout = 20 }
  all.log = function() end
  all.reconnect = false -- what is lost stays lost, but where it says otherwise
  for key, value in pairs(more or {}) do all[key] = value end
  return all
end

--- A line to the broker: { url, cut(), freeze(), thaw(), close(), passed() → how many bytes went through }.
local function new_line(t)
  local control = assert(t.rt.open({ host = "127.0.0.1", port = t.lines }, nil, 10))
  local line = { url = (t.url:gsub("@[^/]*", "@127.0.0.1:" .. assert(control:read(64, 10)):match "%d+")) }
  for _, word in ipairs { "cut", "freeze", "thaw" } do
    line[word] = function()
      assert(control:write(word .. "\n"))
      has(control:read(64, 10), "ok")
    end
  end
  function line.passed()
    assert(control:write "count\n")
    return tonumber((assert(control:read(64, 10)):match "%d+"))
  end
  function line.close() control:close() end
  return line
end

local function with_queue(t, more)
  local conn = assert(t.moonrabbit.connect(options(t, more)))
  local ch = assert(conn:channel { confirm = true })
  return conn, ch, assert(ch:queue_declare("", { exclusive = true })).queue
end

case("confirmed publishes are consumed and acked", { "broker" }, function(t)
  local conn, ch, queue = with_queue(t)
  for i = 1, 300 do assert(ch:publish_async("m" .. i, { routing_key = queue })) end
  assert(ch:wait_for_confirms(20))
  local consumer = assert(ch:consume(queue))
  for i = 1, 300 do
    local message = assert(consumer:receive(20))
    equal("m" .. i, message.body)
    assert(message:ack())
  end
  assert(consumer:cancel())
  equal(0, assert(ch:queue_declare(queue, { passive = true })).message_count)
  local _, err = ch:publish("x", { routing_key = "no-such-queue" })
  equal("unroutable", err and err.kind)
  assert(conn:close(10))
end)

case("handlers wait, and the heartbeats are kept", { "broker" }, function(t)
  local conn, ch, queue = with_queue(t, { heartbeat = 1 })
  local handled = 0
  assert(conn:consume(queue, { concurrency = 10 }, function(message)
    t.moonrabbit.sleep(3.2)
    message:ack()
    handled = handled + 1
  end))
  for i = 1, 10 do assert(ch:publish("m" .. i, { routing_key = queue })) end
  eventually(t, "all are handled", function() return handled == 10 end)
  equal("open", conn:state())
  assert(conn:close(10))
end)

case("a handler that throws is reported, and the next one runs", { "broker" }, function(t)
  local conn, ch, queue = with_queue(t)
  local reported, handled
  conn:on("error", function(text) reported = text end)
  assert(conn:consume(queue, { concurrency = 1, error_delay = 0 }, function(message)
    if message.body == "bad" and not message.redelivered then
      t.moonrabbit.sleep(0.001)
      error "the handler failed"
    end
    message:ack()
    handled = message.body
  end))
  assert(ch:publish("bad", { routing_key = queue }))
  eventually(t, "it came again, and that was told", function() return handled and reported end)
  has(reported, "the handler failed")
  assert(conn:close(10))
end)

case("a handler and a listener may throw what cannot tell what it is, and the next ones run", { "broker" }, function(t)
  local conn, ch, queue = with_queue(t)
  local mute, told, handled = setmetatable({}, { __tostring = function() error "it cannot tell" end }), 0, 0
  conn:on("error", function()
    told = told + 1
    error(mute)
  end)
  assert(conn:consume(queue, { concurrency = 1, error_delay = 0 }, function(message)
    if not message.redelivered then error(mute) end
    message:ack()
    handled = handled + 1
  end))
  for i = 1, 2 do assert(ch:publish("m" .. i, { routing_key = queue })) end
  eventually(t, "both came again, and that was told", function() return handled == 2 and told == 2 end)
  assert(conn:close(10))
end)

case("many tasks publish on one channel, and each has its own answer", { "broker" }, function(t)
  local conn, ch, queue = with_queue(t)
  local good, bad = 0, 0
  for i = 1, 200 do
    t.moonrabbit.spawn(function()
      local ok, err = ch:publish("m", { routing_key = i % 4 == 0 and "no-such-queue" or queue })
      if ok then good = good + 1 elseif err.kind == "unroutable" then bad = bad + 1 end
    end)
  end
  eventually(t, "all are answered", function() return good + bad == 200 end)
  equal(150, good)
  assert(conn:close(10))
end)

local function large(megabytes)
  local parts = {}
  for i = 1, megabytes do parts[i] = (("%015d\n"):format(i * 7919)):rep(65536) end
  return table.concat(parts)
end

local function there_and_back(t, body, more)
  local conn, ch, queue = with_queue(t, more)
  assert(ch:publish(body, { routing_key = queue }))
  local consumer = assert(ch:consume(queue))
  local message = assert(consumer:receive(20))
  equal(true, message.body == body, "the same body")
  assert(message:ack())
  assert(conn:close(10))
end

case("a body of 24 MiB is the same when it comes back", { "broker" }, function(t)
  there_and_back(t, large(24), { max_message_size = 32 * 1024 * 1024 })
end)

case("and so is one of a thousand small frames", { "broker" }, function(t)
  there_and_back(t, large(4), { frame_max = 4096 })
end)

case("TLS: large bodies, there and back", { "broker", "tls" }, function(t)
  there_and_back(t, large(8), { uri = t.tls.url, tls = { ca = t.tls.ca } })
end)

case("a close sends what was published before", { "broker" }, function(t)
  local conn, ch, queue = with_queue(t)
  local name = "conformance-" .. queue
  assert(ch:queue_declare(name, { arguments = { ["x-expires"] = 60000 } }))
  for i = 1, 1000 do assert(ch:publish_async("m" .. i, { routing_key = name })) end
  assert(conn:close(10))
  equal("closed", conn:state())
  conn, ch = with_queue(t)
  eventually(t, "all 1,000 came", function()
    return assert(ch:queue_declare(name, { passive = true })).message_count == 1000
  end)
  local consumer = assert(ch:consume(name, { prefetch = 400 }))
  for _ = 1, 400 do assert(assert(consumer:receive(20)):ack()) end
  assert(conn:close(10)) -- and the acks too
  conn, ch = with_queue(t)
  eventually(t, "the others are back", function()
    return assert(ch:queue_declare(name, { passive = true })).message_count == 600
  end)
  assert(ch:queue_delete(name))
  assert(conn:close(10))
end)

case("a connection that the broker closes ends what waits; another one works", { "broker" }, function(t)
  local conn, ch, queue = with_queue(t)
  local consumer = assert(ch:consume(queue))
  local ended
  t.moonrabbit.spawn(function() ended = select(2, consumer:receive(20)) end)
  t.rt.sleep(0.01)
  local _, err = ch:flow(false) -- not implemented: 540
  equal(540, err and err.code)
  eventually(t, "the consumer ended", function() return ended end)
  equal(540, ended.code)
  eventually(t, "it is closed", function() return conn:state() == "closed" end)
  conn = with_queue(t)
  assert(conn:close(10))
end)

case("the errors of connecting have their kinds", { "broker" }, function(t)
  local function kind(uri, more)
    local conn, err = t.moonrabbit.connect(options(t, { uri = uri, connect_timeout = more }))
    assert(not conn, "connected")
    return err.kind
  end
  equal("auth", kind((t.url:gsub("://[^@]*@", "://guest:wrong@"))))
  equal("vhost", kind((t.url:gsub("/[^/]*$", "/no-such-vhost"))))
end)

case("a peer that says nothing to AMQP is given up in time", { "peer" }, function(t)
  local peer = new_peer(t)
  local conn, err = t.moonrabbit.connect(options(t, {
    uri = ("amqp://127.0.0.1:%d/"):format(peer.port), connect_timeout = 0.1,
  }))
  equal(nil, conn)
  equal("timeout", err.kind)
  peer.close()
end)

case("a line that is cut ends the connection", { "broker", "lines" }, function(t)
  local line = new_line(t)
  local conn, ch, queue = with_queue(t, { uri = line.url })
  assert(ch:publish("x", { routing_key = queue }))
  line.cut()
  eventually(t, "it is closed", function() return conn:state() == "closed" end)
  local ok, err = ch:publish("x", { routing_key = queue })
  equal(nil, ok)
  equal("closed", err.kind)
  equal(true, err.temporary)
  line.close()
end)

-- ---- Back-pressure ----------------------------------------------------------------------------------------------------

case("a broker that does not read holds publishers back within their timeouts, and loses nothing",
  { "broker", "lines" }, function(t)
    local rt, line, ticks, over = t.rt, new_line(t), 0, false
    local conn, ch, queue = with_queue(t, { uri = line.url, max_buffer = 1024 * 1024, heartbeat = 0 })
    rt.spawn(function()
      while not over do
        rt.sleep(0.005)
        ticks = ticks + 1
      end
    end)
    line.freeze()
    local body, accepted = ("x"):rep(65536), 0
    local sent, err
    repeat
      sent, err = ch:publish_async(body, { routing_key = queue, timeout = 1.5 })
      if sent then accepted = accepted + 1 end
    until not sent or accepted == 4096
    over = true
    equal("overflow", err and err.kind)
    assert(ticks > 3, "the others stood still")
    line.thaw()
    assert(ch:wait_for_confirms(60))
    equal(accepted, assert(ch:queue_declare(queue, { passive = true })).message_count)
    assert(conn:close(10))
    line.close()
  end)

case("a consumer without acks that takes nothing stops the reading, and then gets all", { "broker" }, function(t)
  local conn, ch, queue = with_queue(t)
  local count = 12000
  for i = 1, count do assert(ch:publish_async("m" .. i, { routing_key = queue })) end
  assert(ch:wait_for_confirms(30))
  local consumer = assert(ch:consume(queue, { no_ack = true }))
  eventually(t, "as many came as it holds", function() return consumer:buffered() >= 4096 end)
  t.rt.sleep(0.05)
  assert(consumer:buffered() < 8192, consumer:buffered()) -- what one read may bring more is no more than that
  for i = 1, count do equal("m" .. i, assert(consumer:receive(20)).body) end
  assert(conn:close(10))
end)

-- ---- What waits, and never for ever -----------------------------------------------------------------------------------

case("calls end within their timeouts while nothing comes", { "broker", "lines" }, function(t)
  local line = new_line(t)
  local conn, ch, queue = with_queue(t, { uri = line.url, heartbeat = 0 })
  local consumer = assert(conn:consume(queue))
  local publisher = assert(conn:publisher { routing_key = queue })
  line.freeze()
  local function timed_out(ok, err)
    equal(nil, ok)
    equal("timeout", err.kind)
  end
  timed_out(ch:queue_declare(queue, { passive = true, timeout = 0.05 }))
  timed_out(ch:publish("x", { routing_key = queue, timeout = 0.05 }))
  timed_out(publisher:send("x", { timeout = 0.05 }))
  timed_out(consumer:receive(0.05))
  timed_out(ch:wait_for_confirms(0.05))
  timed_out(conn:channel { timeout = 0.05 })
  timed_out(t.moonrabbit.connect(options(t, { uri = line.url, connect_timeout = 0.05 })))
  timed_out(conn:close(0.05))
  equal("closed", conn:state())
  line.close()
end)

case("a task may be cancelled in any wait for the broker, and the connection is as good as before",
  { "broker", "lines" }, function(t)
    local rt, line = t.rt, new_line(t)
    local conn, ch, queue = with_queue(t, { uri = line.url, heartbeat = 0 })
    local other = assert(conn:channel { confirm = true })
    local consumer = assert(conn:consume(queue))
    local publisher = assert(conn:publisher { routing_key = "no-such-queue" })
    local key = { routing_key = queue, timeout = 60 }
    local bare = assert(rt.open({ host = "127.0.0.1", port = t.lines }, nil, 5))
    bare:read(64, 5)
    local waits = {
      receive = function() consumer:receive(60) end,
      call = function() ch:queue_declare(queue, { passive = true, timeout = 60 }) end,
      publish = function() ch:publish("m1", key) end,
      confirmation = function() assert(ch:publish_async("m2", key)):wait(60) end,
      confirms = function()
        other:publish_async("m3", key)
        other:wait_for_confirms(60)
      end,
      send = function() publisher:send "m4" end,
      channel = function() conn:channel { timeout = 60 } end,
      rpc = function() conn:call("m5", { routing_key = "no-such-queue", timeout = 60 }) end,
      connect = function() t.moonrabbit.connect(options(t, { uri = line.url, connect_timeout = 60 })) end,
      read = function() bare:read(64, 60) end,
    }
    line.freeze()
    local tasks, begun, ended = {}, 0, {}
    for name, fn in pairs(waits) do
      tasks[#tasks + 1] = rt.spawn(function()
        begun = begun + 1
        local _, err = t.moonrabbit.pcall(fn)
        ended[name] = err == rt.cancelled and "cancelled" or tostring(err)
      end)
    end
    eventually(t, "they began", function() return begun == #tasks end)
    rt.sleep(0.05)
    for name, result in pairs(ended) do error(name .. " did not wait: " .. result) end
    for _, task in ipairs(tasks) do rt.cancel(task) end
    eventually(t, "they ended", function()
      for name in pairs(waits) do
        if not ended[name] then return false end
      end
      return true
    end)
    for name, result in pairs(ended) do equal("cancelled", result, name) end
    bare:close()
    line.thaw()
    local bodies = {}
    for i = 1, 3 do bodies[i] = assert(consumer:receive(20)).body end
    table.sort(bodies)
    equal("m1 m2 m3", table.concat(bodies, " "))
    assert(ch:publish("m6", key))
    equal("m6", assert(consumer:receive(20)).body)
    equal("open", conn:state())
    assert(conn:close(10))
    line.close()
  end)

-- ---- Coming back ------------------------------------------------------------------------------------------------------

local ways = {
  { "is cut", function(_, line) line.cut() end },
  { "falls silent", function(t, line, conn)
    line.freeze()
    eventually(t, "the heartbeats are missed", function() return conn:state() ~= "open" end)
    line.thaw()
  end },
  { "is closed by the broker", function(_, _, conn)
    local _, err = assert(conn:channel()):flow(false) -- not implemented
    equal(540, err and err.code)
  end },
}

for _, one in ipairs(ways) do
  local way, lose = one[1], one[2]
  case(("a connection that %s comes back, and what consumed and published goes on"):format(way),
    { "broker", "lines" }, function(t)
      local line, states = new_line(t), {}
      local conn = assert(t.moonrabbit.connect(options(t, {
        uri = line.url, reconnect = { first = 0.01 }, heartbeat = way == "falls silent" and 1 or 30,
        name = "conformance",
      })))
      conn:on("state", function(state) states[#states + 1] = state end)
      local queue = "conformance-" .. tostring({}):gsub("%W", "") .. "-" .. t.rt.name
      local ch = assert(conn:channel())
      assert(ch:queue_declare(queue, { durable = true, arguments = { ["x-expires"] = 60000 } }))
      local publisher = assert(conn:publisher { routing_key = queue })
      local taken, handled = {}, {}
      local consumer = assert(conn:consume(queue))
      t.rt.spawn(function()
        while true do
          local message = consumer:receive(60)
          if not message then break end
          taken[#taken + 1] = message.body
          message:ack()
        end
        taken.ended = true
      end)
      assert(publisher:send "before")
      eventually(t, "the first came", function() return taken[1] end)
      assert(conn:flush(5))
      assert(ch:queue_declare(queue, { passive = true })) -- and the broker has the ack

      lose(t, line, conn)
      eventually(t, "it is lost", function() return states[1] end)
      equal("recovering", states[1])
      local confirmation = assert(publisher:send_async "meanwhile")
      assert(conn:wait_open(30))
      assert(confirmation:wait(30))
      assert(publisher:send "after")
      eventually(t, "both came", function() return #taken >= 3 end)
      equal("before meanwhile after", table.concat(taken, " "))
      assert(conn:consume(queue, { concurrency = 1 }, function(message)
        handled[1] = message.body
        message:ack()
      end))
      assert(consumer:cancel())
      assert(publisher:send "handled")
      eventually(t, "a handler runs", function() return handled[1] == "handled" end)
      equal(3, #taken)
      assert(conn:channel()):queue_delete(queue)
      assert(conn:close(10))
      equal("closed", conn:state())
      eventually(t, "who waited learns of the end", function() return taken.ended end)
      line.close()
    end)
end

-- ---- Idle -------------------------------------------------------------------------------------------------------------

-- How often this process has slept: each is one time that the system woke it.
local function naps()
  local file = io.open "/proc/self/status"
  local text = file and file:read "*a" or ""
  if file then file:close() end
  return tonumber(text:match "\nvoluntary_ctxt_switches:%s*(%d+)")
end

-- How often more it woke than for the heartbeats of a while, and for the end of that.
local function needless_wakes(t, line)
  local seconds = 2.2
  local bytes, slept, cpu = line.passed(), naps(), os.clock()
  t.rt.sleep(seconds)
  cpu, slept = os.clock() - cpu, slept and naps() - slept
  local beats = (line.passed() - bytes) / 8 -- the size of the frame; nothing else goes through
  assert(cpu < seconds / 5, ("it used %.2f s of the CPU"):format(cpu)) -- a loop that never sleeps
  -- Both sides send one each half of the interval, unless the machine is busy.
  if beats < 6 then return 1, ("there were %d heartbeats only"):format(beats) end
  local most = (t.wakes or 1) * beats + 1 + seconds * (t.idle_turns or 0)
  return slept and slept - most or 0, ("it woke %d times for %d heartbeats"):format(slept or 0, beats)
end

case("an idle connection wakes for its heartbeats, and for nothing else", { "broker", "lines" }, function(t)
  local rt, line = t.rt, new_line(t)
  local conn, ch, queue = with_queue(t, { uri = line.url, heartbeat = 1 })
  local consumer = assert(ch:consume(queue))
  assert(conn:consume(queue, function() end))
  local waiting = rt.spawn(function() consumer:receive(60) end)
  rt.sleep(0.6) -- over half of the interval: what was to wake it while it worked has done so
  local tries = 0
  local needless, text
  repeat -- a heartbeat that is under way at either end is counted on one side only: not each time
    tries = tries + 1
    needless, text = needless_wakes(t, line)
  until needless <= 0 or tries == 5
  assert(needless <= 0, text)
  equal("open", conn:state())
  rt.cancel(waiting)
  assert(conn:close(10))
  line.close()
end)

conformance.cases = cases

-- ---- Running them ---------------------------------------------------------------------------------------------------

local function missing(t, one)
  for _, need in ipairs(one.needs) do
    if need == "peer" then
      if not t.listen and not t.lines then return need end
    elseif need == "broker" and not t.url or need ~= "broker" and not t[need] then return need end
  end
end

local function outcome(t, one)
  local lacking = missing(t, one)
  if lacking then return "skipped: no " .. lacking end
  local ok, err = t.moonrabbit.pcall(one.fn, t)
  local result = not ok and tostring(err) or #t.errors > 0 and "an error in a task: " .. t.errors[1] or "ok"
  for i = #t.errors, 1, -1 do t.errors[i] = nil end
  return result
end

--- Runs the cases, in a task of the runtime.
---@param t table see above
---@param report fun(name: string, result: string)? called after each
---@param wanted string? a pattern of the names of those to run; all by default
---@return table results { name, "ok" | "skipped: …" | what went wrong } each
function conformance.run(t, report, wanted)
  local results = {}
  for _, one in ipairs(cases) do
    if one.name:find(wanted or "") then
      local result = outcome(t, one)
      results[#results + 1] = { one.name, result }
      if report then report(one.name, result) end
    end
  end
  return results
end

return conformance
