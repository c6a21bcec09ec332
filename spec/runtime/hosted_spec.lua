-- What cqueues, Copas and luv have each for themselves: where a call is wrong, and how they live in a user's loop.
local broker = require "support.broker"
local loops = require "support.loops"
local moonrabbit = require "moonrabbit"

local function thrown(fn, ...)
  local ok, err = pcall(function(...)
    local result = fn(...) -- no tail call: the line is looked at
    return result
  end, ...)
  assert.is_false(ok)
  return tostring(err)
end

describe("moonrabbit.on", function()
  it("knows its runtimes", function()
    assert.matches("there is no runtime 'none'", thrown(moonrabbit.on, "none"))
    assert.matches("there is no runtime 'pcall'", thrown(moonrabbit.on, "pcall"))
    assert.matches("hosted_spec.lua:", thrown(moonrabbit.on, 1))
    assert.equal(moonrabbit.on "native", moonrabbit.on "native")
    assert.equal("native", moonrabbit.on "native".name)
    assert.equal(moonrabbit.types, moonrabbit.on "native".types)
    assert.is_nil(moonrabbit.on "native".nothing)
  end)

  it("takes no option 'runtime', and passes the rest on", function()
    local on = moonrabbit.on "native"
    assert.matches("hosted_spec.lua:%d+: connect: unknown option 'runtime'", thrown(on.connect, { runtime = "native" }))
    assert.matches("hosted_spec.lua:%d+: pool: connect: unknown option 'runtime'",
      thrown(on.pool, { connect = { runtime = "native" } }))
    assert.matches("unknown option 'uris'", thrown(on.connect, { uris = "amqp://" }))
    assert.matches("a URI or a table of options", thrown(on.connect))
    assert.matches("a URI or a table of options", thrown(on.connect, 5))
    assert.matches("a URI or a table of options", thrown(on.pool, 5))
    assert.equal("refused", select(2, on.connect "amqp://127.0.0.1:1/").kind)
    assert.truthy(on.pool "amqp://127.0.0.1:1/":close())
  end)
end)

-- Runs fn(runtime) in a loop.
local function run(name, fn)
  if name == "luv" then debug.getregistry()["moonrabbit.spec.luv"] = require "luv" end -- see support/loops.lua
  loops.run(name, fn)
end

for _, name in ipairs { "cqueues", "copas", "luv" } do
  local it_runs = broker.it_unless(it, pending, not loops.has(name) and name .. " is not installed" or nil)

  describe("in the loop of " .. name, function()
    it_runs("an on_error that throws harms nobody, and what it was told is not lost", function()
      local stderr, written, slept = io.stderr, {}, nil
      io.stderr = { write = function(_, ...) written[#written + 1] = table.concat { ... } end } -- luacheck: ignore 122
      local fine, problem = pcall(run, name, function(runtime)
        local on_error = runtime.on_error
        runtime.on_error = function() error "on_error failed too" end
        runtime.spawn(function() error "a task failed" end)
        for _ = 1, 1000 do
          if written[1] then break end
          runtime.sleep(0.01)
        end
        runtime.on_error = on_error
        slept = true
      end)
      io.stderr = stderr -- luacheck: ignore 122
      assert(fine, problem)
      assert.is_true(slept)
      assert.equal(1, #written)
      assert.matches("on_error failed too", written[1])
      assert.matches("a task failed\nstack traceback", written[1])
    end)

    it_runs("a wait inside a function that C calls says so, and takes no one's place", function()
      run(name, function(runtime)
        local condition, waits, woken = runtime.condition(), false, nil
        local function soon(fn)
          for _ = 1, 1000 do
            if fn() then break end
            runtime.sleep(0.001)
          end
        end
        local text = thrown(string.gsub, "x", "x", function() condition:wait(0.01) end)
        assert.matches("this call waits, and .* function that C calls", text)
        runtime.spawn(function()
          waits = true
          woken = condition:wait(20)
        end)
        soon(function() return waits end)
        condition:signal()
        soon(function() return woken ~= nil end)
        assert.is_true(woken)
      end)
    end)
  end)
end

local it_cqueues = broker.it_unless(it, pending, not loops.has "cqueues" and "cqueues is not installed" or nil)

describe("cqueues", function()
  local function on() return moonrabbit.on "cqueues" end

  it_cqueues("says where its calls belong", function()
    assert.matches("must be made in a cqueue", thrown(on().connect, "amqp://127.0.0.1:1/"))
    assert.matches("must be made in a cqueue", thrown(on().sleep, 1))
    assert.matches("hosted_spec.lua:%d+: spawn: .*in a cqueue", thrown(on().spawn, print))
  end)

  it_cqueues("throws for what belongs to another cqueue", function()
    local cqueues = require "cqueues"
    local runtime = require "moonrabbit.runtime.cqueues"
    local first, second, condition, err = cqueues.new(), cqueues.new(), nil, nil
    first:wrap(function() condition = runtime.condition() end)
    assert(first:loop())
    second:wrap(function() err = select(2, on().pcall(condition.wait, condition, 1)) end)
    assert(second:loop())
    assert.matches("another cqueue", err)
  end)

  it_cqueues("looks names up by the system, and by cqueues.dns where it is told to", function()
    local dns, hosts = require "cqueues.dns", require "cqueues.dns.hosts"
    local config, resolvers = require "cqueues.dns.config", require "cqueues.dns.resolvers"
    local runtime = require "moonrabbit.runtime.cqueues"
    local known = hosts.new()
    known:insert("127.0.0.1", "rabbit.only-in-cqueues.example")
    local server = require "moonrabbit.runtime.native".listen("127.0.0.1", 0)
    local endpoint, none = { host = "rabbit.only-in-cqueues.example", port = server:port() }, { port = 1 }
    none.host = "none.only-in-cqueues.example"
    local before = dns.setpool(resolvers.new(config.new { lookup = { "file" } }, known, require "cqueues.dns.hints".new(
      config.new {})))
    local by_system, by_dns, unknown, cancelled
    loops.run("cqueues", function()
      by_system = select(2, runtime.open(endpoint, nil, 20))
      runtime.dns = true
      by_dns = runtime.open(endpoint, nil, 20)
      unknown = { runtime.open(none, nil, 20) }
      local query = dns.query
      local silence = require "cqueues.condition".new()
      dns.query = function() -- of a name server that says nothing
        silence:wait()
        return nil, "given up"
      end
      local task = runtime.spawn(function()
        local _, err = on().pcall(runtime.open, none, nil, 60)
        cancelled = err == runtime.cancelled
      end)
      runtime.sleep(0.01)
      runtime.cancel(task)
      local late = { runtime.open(none, nil, 0.01) }
      dns.query = query
      assert.equal("timeout", late[2])
      by_dns:close()
      silence:signal()
    end)
    runtime.dns = nil
    if before then dns.setpool(before) end
    server:close()
    assert.equal("dns", by_system)
    assert.truthy(by_dns)
    assert.equal("dns", unknown[2])
    assert.matches("cqueues.dns", unknown[3])
    assert.is_true(cancelled)
  end)

  it_cqueues("may be stepped, and goes on beside what fails", function()
    local cqueues = require "cqueues"
    local runtime, cq, errors, slept = require "moonrabbit.runtime.cqueues", cqueues.new(), {}, 0
    local on_error = runtime.on_error
    runtime.on_error = function(text) errors[#errors + 1] = text end
    cq:wrap(function()
      on().spawn(function() error "a task failed" end)
      on().spawn(function() on().sleep(0.01) slept = slept + 1 end)
      cqueues.sleep(0.001)
      slept = slept + 1
    end)
    while not cq:empty() do assert(cq:step(1)) end
    runtime.on_error = on_error
    assert.equal(2, slept)
    assert.equal(1, #errors)
    assert.matches("a task failed\nstack traceback", errors[1])
  end)
end)

local it_luv = broker.it_unless(it, pending, not loops.has "luv" and "luv is not installed" or nil)

describe("luv", function()
  local function on()
    debug.getregistry()["moonrabbit.spec.luv"] = require "luv" -- never collected: see support/loops.lua
    return moonrabbit.on "luv"
  end

  it_luv("says where its calls belong", function()
    assert.matches("must be made in a coroutine", thrown(on().connect, "amqp://127.0.0.1:1/"))
    local uv, text = require "luv", nil
    local timer = uv.new_timer()
    timer:start(1, 0, function()
      text = select(2, pcall(on().sleep, 1))
      timer:close()
    end)
    uv.run()
    assert.matches("in callbacks too", text)
  end)

  it_luv("throws nothing from a callback, and goes on", function()
    local uv, runtime, errors, done = require "luv", require "moonrabbit.runtime.luv", {}, false
    local on_error = runtime.on_error
    runtime.on_error = function(text) errors[#errors + 1] = text end
    on().spawn(function() error "a task failed" end)
    coroutine.wrap(function() -- not one of ours
      on().sleep(0.001)
      error "the user's own coroutine failed"
    end)()
    on().spawn(function()
      on().sleep(0.01)
      done = true
    end)
    uv.run()
    runtime.on_error = on_error
    assert.is_true(done)
    assert.equal(2, #errors)
    assert.matches("a task failed\nstack traceback", errors[1])
    assert.matches("own coroutine failed\nstack traceback", errors[2])
  end)

  it_luv("ends a coroutine of the user's own quietly when it is cancelled", function()
    local uv, runtime, errors, task, ended = require "luv", require "moonrabbit.runtime.luv", {}, nil, true
    local on_error = runtime.on_error
    runtime.on_error = function(text) errors[#errors + 1] = text end
    coroutine.wrap(function()
      task = runtime.current()
      on().sleep(60)
      ended = false
    end)()
    on().spawn(function() runtime.cancel(task) end)
    uv.run()
    runtime.on_error = on_error
    assert.is_true(ended)
    assert.same({}, errors)
  end)

  local function handles()
    local n = 0
    require "luv".walk(function() n = n + 1 end)
    return n
  end

  it_luv("keeps no timer of coroutines that are over", function()
    local uv, slept = require "luv", 0
    for _ = 1, 2000 do
      coroutine.wrap(function()
        on().sleep(0.001)
        slept = slept + 1
      end)()
    end
    uv.run()
    uv.run() -- what is closed is let go
    assert.equal(2000, slept)
    assert.truthy(handles() < 100, handles())
  end)

  it_luv("keeps no handle of a server that was forgotten, once its descriptor is another's", function()
    local uv, runtime = require "luv", require "moonrabbit.runtime.luv"
    local taken
    on().spawn(function()
      local descriptor
      local task = on().spawn(function()
        local server = assert(runtime.listen("127.0.0.1", 0))
        descriptor = server.socket:fd()
        on().pcall(server.accept, server)
      end)
      on().sleep(0.001)
      runtime.cancel(task)
      on().sleep(0.001)
      task = nil -- luacheck: ignore 311
      collectgarbage()
      collectgarbage()
      local servers = {} -- until one has the descriptor: others may have become free too
      while not taken and #servers < 500 do
        local server = assert(runtime.listen("127.0.0.1", 0))
        servers[#servers + 1], taken = server, server.socket:fd() == descriptor
      end
      for _, server in ipairs(servers) do server:close() end
    end)
    local deadline = runtime.now() + 20
    while uv.run "nowait" and runtime.now() < deadline do end -- luacheck: ignore
    assert.is_true(taken)
    assert.is_falsy(uv.loop_alive())
  end)

  it_luv("goes on when its user has closed every handle", function()
    local uv, runtime, words, slept = require "luv", require "moonrabbit.runtime.luv", {}, 0
    local function talk(server)
      local near = assert(runtime.open({ host = "127.0.0.1", port = server:port() }, nil, 5))
      local far = assert(server:accept())
      on().spawn(function()
        on().sleep(0.001)
        far:write "x"
      end)
      words[#words + 1] = near:read(1, 20)
      return near, far
    end
    on().spawn(function()
      local server = assert(runtime.listen("127.0.0.1", 0))
      local near, far = talk(server)
      on().spawn(function() slept = slept + 1 end) -- is in the queue meanwhile, and in the next turn
      uv.walk(function(handle) if not handle:is_closing() then handle:close() end end)
      local deadline = runtime.now() + 0.003
      while runtime.now() < deadline do end -- luacheck: ignore
      on().sleep(0.001)
      slept = slept + 1
      near:close()
      far:close()
      server:close()
    end)
    uv.run()
    on().spawn(function()
      local server = assert(runtime.listen("127.0.0.1", 0))
      local near, far = talk(server)
      near:close()
      far:close()
      server:close()
    end)
    uv.run()
    assert.equal("x x", table.concat(words, " "))
    assert.equal(2, slept)
  end)

  it_luv("keeps uv.run no longer than something is waited for", function()
    local uv, runtime = require "luv", require "moonrabbit.runtime.luv"
    local condition, began = runtime.condition(), uv.hrtime()
    on().spawn(function() condition:wait(60) end)
    on().spawn(function()
      on().sleep(0.001)
      condition:signal()
    end)
    uv.run()
    assert.truthy((uv.hrtime() - began) / 1e9 < 30)
    assert.is_falsy(uv.loop_alive())
  end)

  it_luv("a wait that could not begin leaves nothing behind", function()
    local uv, runtime, began, resumed = require "luv", require "moonrabbit.runtime.luv", nil, false
    local co = coroutine.create(function()
      local condition = runtime.condition()
      began = uv.hrtime()
      thrown(string.gsub, "x", "x", function() condition:wait(60) end)
      thrown(string.gsub, "x", "x", function() on().sleep(-1) end)
      coroutine.yield() -- its user's matter
      resumed = true
    end)
    assert(coroutine.resume(co))
    uv.run()
    assert.is_false(resumed)
    assert.truthy((uv.hrtime() - began) / 1e9 < 30)
    assert.is_falsy(uv.loop_alive())
  end)

  it_luv("runs what is spawned after its user has closed every handle, and what was before", function()
    local uv, ran = require "luv", 0
    local timer = uv.new_timer()
    timer:start(1, 0, function()
      on().spawn(function() ran = ran + 1 end)
      uv.walk(function(handle) if not handle:is_closing() then handle:close() end end)
      on().spawn(function() ran = ran + 1 end)
    end)
    uv.run()
    assert.equal(2, ran)
  end)

  it_luv("runs turn by turn", function()
    local uv, turns, slept = require "luv", 0, false
    on().spawn(function()
      while turns < 3 do on().sleep(0.001) end
      slept = true
    end)
    for _ = 1, 1e6 do
      if not uv.run "nowait" then break end
      turns = turns + 1
    end
    assert.is_true(slept)
  end)

  -- Runs fn in a task while libuv looks names up as `look_up` does.
  local function with_names(look_up, fn)
    local uv = require "luv"
    local real = uv.getaddrinfo
    uv.getaddrinfo = look_up
    on().spawn(fn)
    uv.run()
    uv.getaddrinfo = real
  end

  it_luv("gives up a name at the timeout, and a late answer meets nobody", function()
    local runtime, condition = require "moonrabbit.runtime.luv", nil
    local answer, cancelled, kind, woken
    with_names(function(_, _, _, fn)
      answer = fn
      return { cancel = function() cancelled = true end }
    end, function()
      condition = runtime.condition()
      on().spawn(function()
        on().sleep(0.03)
        answer(nil, {})
      end)
      kind = select(2, runtime.open({ host = "slow.example", port = 1 }, nil, 0.01))
      woken = condition:wait(0.05)
    end)
    assert.equal("timeout", kind)
    assert.is_true(cancelled)
    assert.is_false(woken)
  end)

  it_luv("tries each of a name's addresses", function()
    local runtime, opened = require "moonrabbit.runtime.luv", nil
    with_names(function(_, _, _, fn)
      local timer = require "luv".new_timer()
      timer:start(1, 0, function()
        timer:close()
        fn(nil, { { addr = "127.0.0.2" }, { addr = "127.0.0.1" } })
      end)
      return { cancel = function() end }
    end, function()
      local server = assert(runtime.listen("127.0.0.1", 0))
      opened = runtime.open({ host = "two.example", port = server:port() }, nil, 20)
      if opened then opened:close() end
      server:close()
    end)
    assert.truthy(opened)
  end)
end)

local it_copas = broker.it_unless(it, pending, not loops.has "copas" and "Copas is not installed" or nil)

describe("Copas", function()
  local function on()
    loops.find_copas()
    return moonrabbit.on "copas"
  end

  it_copas("says where its calls belong", function()
    assert.matches("in a thread of Copas", thrown(on().connect, "amqp://127.0.0.1:1/"))
    assert.matches("in a thread of Copas", thrown(on().sleep, 1))
  end)

  it_copas("refuses what its select cannot wait for, instead of ending the loop", function()
    loops.run("copas", function(runtime) runtime.sleep(0.001) end) -- Copas 1: its alarm has its descriptor now
    local files, line = {}, require "moonrabbit.runtime.native".listen("127.0.0.1", 0)
    repeat files[#files + 1] = io.open "/dev/null" until #files > 1030 or not files[1]
    if #files <= 1030 then return pending "ulimit -n is too small" end
    local problem, listening, refused
    loops.run("copas", function(runtime)
      local _, _, text = runtime.open({ host = "127.0.0.1", port = line:port() }, nil, 5)
      problem = text
      listening, refused = runtime.listen("127.0.0.1", 0)
      runtime.sleep(0.001) -- the loop goes on
    end)
    for _, file in ipairs(files) do file:close() end
    line:close()
    assert.matches("no room for descriptor %d+: Copas waits by select%(2%), which takes none over 1023", problem)
    assert.is_nil(listening)
    assert.matches("no room for descriptor", refused)
  end)

  it_copas("shares the loop with servers and threads, and what they wait for", function()
    loops.find_copas()
    local copas, socket = require "copas", require "socket"
    local server = assert(socket.bind("127.0.0.1", 0))
    local _, port = server:getsockname()
    copas.addserver(server, function(client)
      on().sleep(0.01) -- a handler of Copas's own may wait
      copas.send(client, "late\n")
      client:close()
    end)
    local line
    copas.addthread(function()
      local client = socket.tcp()
      assert(copas.connect(client, "127.0.0.1", port))
      line = copas.receive(client)
      client:close()
    end)
    local turns = 0
    while not line and turns < 10000 do
      copas.step(1)
      turns = turns + 1
    end
    if copas.removeserver then copas.removeserver(server) end
    assert.equal("late", line)
    assert.truthy(turns < 100, turns)
  end)

  it_copas("works in its timers, and keeps no loop that is told to end (Copas 4)", function()
    loops.find_copas()
    local copas = require "copas"
    if not copas.waitforexit then return pending "this is an older Copas: set MOONRABBIT_COPAS" end
    local condition, ticks, ended = require "moonrabbit.runtime.copas".condition(), 0, nil
    local deadline = require "socket".gettime() + 20
    copas.loop(function()
      local timer
      timer = require "copas.timer".new {
        delay = 0.001, recurring = true,
        callback = function()
          on().sleep(0.001)
          ticks = ticks + 1
          if ticks == 3 then
            timer:cancel()
            copas.exit()
          end
        end,
      }
      copas.addthread(function()
        copas.waitforexit()
        condition:signal()
      end)
      ended = condition:wait(60)
    end)
    assert.equal(3, ticks)
    assert.is_true(ended)
    assert.truthy(require "socket".gettime() < deadline)
  end)
end)
