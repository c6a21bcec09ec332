local rt = require "moonrabbit.runtime.native"
local timers = require "moonrabbit.runtime.native.timers"
local yieldable = require "moonrabbit.runtime.pcall"
local ports = require "support.ports"
local tls_support = require "support.tls"

--- Yields until the condition holds.
local function eventually(fn)
  local deadline = rt.now() + 20
  while not fn() do
    assert(rt.now() < deadline, "it never happens")
    rt.sleep(0.001)
  end
end

describe("the native runtime", function()
  local errors

  before_each(function()
    errors = {}
    rt.on_error = function(text) errors[#errors + 1] = text end
  end)

  after_each(function()
    rt.long_turn, rt.on_long_turn = nil, nil
    assert.same({}, errors)
  end)

  describe("tasks", function()
    it("start at the next turn, in order, with their arguments", function()
      local seen = {}
      rt.run(function()
        rt.spawn(function(...) seen[#seen + 1] = { n = select("#", ...), ... } end, 1, nil, 3, nil)
        rt.spawn(function() seen[#seen + 1] = "second" end)
        seen[#seen + 1] = "spawned"
        rt.sleep(0)
      end)
      assert.same({ "spawned", { n = 4, 1, nil, 3, nil }, "second" }, seen)
    end)

    it("return what run returns, nils too", function()
      local function count(...) return select("#", ...), ... end
      assert.same({ 3, nil, 2, nil }, { count(rt.run(function(...) return ... end, nil, 2, nil)) })
    end)

    it("know themselves", function()
      assert.is_nil(rt.current())
      rt.run(function()
        local me = rt.current()
        local other
        other = rt.spawn(function()
          assert.equal(other, rt.current())
          rt.sleep(0.001)
          assert.equal(other, rt.current())
        end)
        assert.are_not.equal(me, other)
        rt.sleep(0.01)
        assert.equal(me, rt.current())
      end)
      assert.is_nil(rt.current())
    end)

    it("that fail are reported with a traceback, and the others go on", function()
      local done = false
      rt.run(function()
        rt.spawn(function() error("first failure") end)
        rt.spawn(function() error(setmetatable({}, { __tostring = function() return "an object" end })) end)
        rt.spawn(function()
          rt.sleep(0.001)
          done = true
        end)
        eventually(function() return done end)
      end)
      assert.equal(2, #errors)
      assert.matches("native_spec%.lua:%d+: first failure\nstack traceback:", errors[1])
      assert.matches("^an object\nstack traceback:", errors[2])
      errors = {}
    end)

    it("that fail in run throw there: with a traceback, or the object itself", function()
      local ok, text = pcall(rt.run, function()
        rt.sleep(0)
        error("mine")
      end)
      assert.is_false(ok)
      assert.matches("native_spec%.lua:%d+: mine\nstack traceback:", text)
      local object = {}
      assert.equal(object, select(2, pcall(rt.run, function() error(object) end)))
    end)

    it("survive an on_error that fails", function()
      local stderr, written = io.stderr, {}
      io.stderr = { write = function(_, ...) written[#written + 1] = table.concat { ... } end } -- luacheck: ignore
      rt.on_error = function() error("worse") end
      rt.run(function()
        rt.spawn(function() error("bad") end)
        rt.sleep(0.001)
      end)
      io.stderr = stderr -- luacheck: ignore
      assert.matches("on_error failed: .*worse\nfor: .*bad", table.concat(written))
    end)

    it("that yield to nobody are told so", function()
      rt.run(function()
        rt.spawn(function() coroutine.yield(1) end)
        rt.sleep(0.001)
      end)
      assert.equal(1, #errors)
      assert.matches("coroutine%.yield", errors[1])
      errors = {}
    end)

    it("come by the hundred thousand without piling up", function()
      local count = 0
      rt.run(function()
        for i = 1, 100000 do
          rt.spawn(function() count = count + 1 end)
          if i % 100 == 0 then rt.sleep(0) end
        end
        eventually(function() return count == 100000 end)
      end)
      assert.is_true(timers.count() < 5)
    end)

    it("cannot be made of something else", function()
      assert.has_error(function() rt.spawn(nil) end)
    end)
  end)

  describe("cancel", function()
    it("ends a task in its wait, quietly", function()
      local condition, reached = rt.condition(), false
      rt.run(function()
        local task = rt.spawn(function()
          condition:wait()
          reached = true
        end)
        rt.sleep(0)
        rt.cancel(task)
        rt.sleep(0)
        condition:signal()
        rt.sleep(0.001)
      end)
      assert.is_false(reached)
    end)

    it("can be caught; the waits after it work", function()
      local caught, slept
      rt.run(function()
        local task = rt.spawn(function()
          local _, err = yieldable.pcall(rt.sleep, 1000)
          caught = err
          rt.sleep(0.001)
          slept = true
        end)
        rt.sleep(0)
        rt.cancel(task)
        rt.cancel(task)
        eventually(function() return slept end)
      end)
      assert.equal(rt.cancelled, caught)
    end)

    it("reaches the next wait of a task that runs or has not begun", function()
      local trace = {}
      rt.run(function()
        local task = rt.spawn(function()
          trace[#trace + 1] = "begun"
          rt.sleep(0.001)
          trace[#trace + 1] = "not reached"
        end)
        rt.cancel(task)
        rt.spawn(function()
          rt.cancel(rt.current())
          trace[#trace + 1] = "still here"
          rt.condition():wait(1000)
          trace[#trace + 1] = "not reached"
        end)
        rt.sleep(0.01)
        rt.cancel(task) -- ended: nothing happens
      end)
      assert.same({ "begun", "still here" }, trace)
    end)
  end)

  describe("conditions", function()
    it("wake one at a time in order, or all", function()
      local condition, woken = rt.condition(), {}
      rt.run(function()
        for i = 1, 4 do
          rt.spawn(function()
            assert(condition:wait())
            woken[#woken + 1] = i
          end)
        end
        rt.sleep(0)
        condition:signal()
        rt.sleep(0)
        assert.same({ 1 }, woken)
        condition:signal()
        condition:signal()
        rt.sleep(0)
        assert.same({ 1, 2, 3 }, woken)
        condition:broadcast()
        condition:broadcast()
        rt.sleep(0)
        assert.same({ 1, 2, 3, 4 }, woken)
      end)
    end)

    it("keep no signal, and time out", function()
      local condition = rt.condition()
      rt.run(function()
        condition:signal()
        assert.is_false(condition:wait(0.001))
        assert.is_false(condition:wait(0))
      end)
      assert.is_false(condition:wait(0.001))
    end)

    it("forget who timed out", function()
      local condition, woken = rt.condition(), {}
      rt.run(function()
        local gave_up
        rt.spawn(function() gave_up = not condition:wait(0.001) end)
        rt.spawn(function() woken[1] = condition:wait(20) end)
        eventually(function() return gave_up end)
        condition:signal()
        rt.sleep(0)
        assert.same({ true }, woken)
      end)
    end)

    it("leave no garbage, in the heap of timers neither", function()
      local ping, pong = rt.condition(), rt.condition()
      rt.run(function()
        local task = rt.spawn(function()
          while true do
            ping:wait(100)
            pong:signal()
          end
        end)
        rt.sleep(0)
        ping:signal()
        pong:wait(100)
        collectgarbage()
        collectgarbage()
        collectgarbage("stop")
        local before = collectgarbage("count")
        for _ = 1, 10000 do
          ping:signal()
          pong:wait(100)
        end
        local grown = collectgarbage("count") - before
        collectgarbage("restart")
        assert.is_true(timers.count() <= 2)
        assert.is_true(grown < 64, grown .. " KiB")
        rt.cancel(task)
        rt.sleep(0)
      end)
      assert.equal(0, timers.count())
    end)
  end)

  describe("timers", function()
    it("come in the order of their time", function()
      local order, late
      rt.run(function()
        repeat -- until each has its turn before the first one's time
          order, late = {}, false
          local began = rt.now()
          for _, i in ipairs { 5, 1, 4, 2, 3, 6 } do
            rt.spawn(function()
              late = late or rt.now() > began + 0.02
              rt.sleep(began + 0.02 + i * 0.005 - rt.now())
              order[#order + 1] = i
            end)
          end
          eventually(function() return #order == 6 end)
        until not late
      end)
      assert.same({ 1, 2, 3, 4, 5, 6 }, order)
    end)

    it("are never early, however they are moved", function()
      rt.run(function()
        local condition = rt.condition()
        local done = 0
        for i = 1, 50 do
          rt.spawn(function()
            for j = 1, 5 do
              local seconds = ((i * 7 + j * 3) % 11) / 1000
              local started = rt.now()
              if not condition:wait(seconds) then assert(rt.now() - started >= seconds) end
            end
            done = done + 1
          end)
        end
        while done < 50 do
          condition:signal()
          rt.sleep(0.001)
        end
      end)
      assert.equal(0, timers.count())
    end)
  end)

  describe("outside its tasks", function()
    it("runs the loop until the call is done", function()
      local ran = false
      rt.spawn(function() ran = true end)
      rt.sleep(0.001)
      assert.is_true(ran)
      local condition = rt.condition()
      rt.spawn(function()
        rt.sleep(0.001)
        condition:signal()
      end)
      assert.is_true(condition:wait(20))
    end)

    it("does the same in a coroutine of the user's own, if no loop is below", function()
      local co = coroutine.wrap(function()
        rt.sleep(0.001)
        return "slept"
      end)
      assert.equal("slept", co())
    end)

    it("throws in such a coroutine inside the loop, and names moonrabbit.spawn", function()
      rt.run(function()
        local co = coroutine.create(function() rt.sleep(0) end)
        local ok, text = coroutine.resume(co)
        assert.is_false(ok)
        assert.matches("native_spec%.lua:%d+: .*moonrabbit%.spawn", text)
        assert.is_false((pcall(rt.run, function() end)))
        rt.sleep(0)
      end)
    end)

    it("throws in a callback of the loop", function()
      local text
      rt.on_error = function() text = select(2, pcall(rt.sleep, 0)) end
      rt.run(function()
        rt.spawn(function() error("x") end)
        rt.sleep(0.001)
      end)
      assert.matches("callback", text)
    end)

    it("sees that nothing can ever wake it", function()
      local ok, text = pcall(function() rt.condition():wait() end)
      assert.is_false(ok)
      assert.matches("^deadlock", text)
      ok, text = pcall(rt.run, function() rt.condition():wait() end)
      assert.is_false(ok)
      assert.matches("^deadlock", text)
      rt.sleep(0.001)
    end)

    it("lets the descriptors have their turn between calls that never block", function()
      local server = assert(rt.listen("127.0.0.1", 0))
      local accepted
      rt.spawn(function() accepted = server:accept() end)
      local client
      rt.spawn(function() client = assert(rt.open({ host = "127.0.0.1", port = server:port() }, nil, 20)) end)
      local deadline = rt.now() + 20
      while not (accepted and client) do
        rt.sleep(0)
        assert(rt.now() < deadline)
      end
      accepted:close()
      client:close()
      server:close()
    end)
  end)

  describe("where nothing can yield", function()
    local old = _VERSION == "Lua 5.1" and not rawget(_G, "jit") -- its pcall and generic for cannot either

    local function in_gsub(fn)
      return function() string.gsub("x", "x", function() fn() end) end
    end

    local function in_sort(fn)
      return function() table.sort({ 1, 2, 3 }, function(a, b) fn() return a < b end) end
    end

    local function in_index(fn)
      return function() return setmetatable({}, { __index = function() fn() end }).x end
    end

    local function in_for(fn)
      return function() for _ in function() fn() end do end end -- luacheck: ignore 512
    end

    local ways = { ["string.gsub"] = in_gsub, ["table.sort"] = in_sort }
    if old then ways["generic for"] = in_for end

    for name, way in pairs(ways) do
      it("a wait throws in " .. name .. ", says why, and leaves nothing behind", function()
        local condition, elsewhere = rt.condition(), rt.condition()
        local texts, woken = {}, {}
        local function attempt(fn)
          local ok, text = yieldable.pcall(way(fn))
          texts[#texts + 1] = ok and "it waited" or text
        end
        rt.run(function()
          rt.spawn(function()
            attempt(function() condition:wait(0.001) end)
            attempt(function() rt.sleep(0) end)
            attempt(function() rt.sleep(0.001) end)
            woken.first = elsewhere:wait(0.1)
          end)
          rt.spawn(function() woken.second = condition:wait(20) end)
          rt.sleep(0)
          rt.sleep(0)
          condition:signal() -- is the second's: the first never waited
          eventually(function() return woken.second ~= nil and woken.first ~= nil end)
        end)
        assert.same({ first = false, second = true }, woken)
        assert.equal(3, #texts)
        for _, text in ipairs(texts) do
          assert.matches("this call waits, and .* cannot", text)
          assert.matches(old and "use moonrabbit%.pcall, and consumer:receive" or "wait before or after it", text)
        end
        assert.is_nil(condition.first)
        assert.equal(0, timers.count())
      end)

      it("a task that dies of it in " .. name .. " is reported, and the loop goes on", function()
        local condition = rt.condition()
        local reported = {}
        rt.on_error = function(text) reported[#reported + 1] = text end
        rt.run(function()
          rt.spawn(way(function() condition:wait(0.001) end))
          rt.spawn(way(function() rt.sleep(0) end))
          rt.sleep(0.005)
          condition:signal()
          rt.sleep(0.005)
        end)
        assert.equal(2, #reported)
        for _, text in ipairs(reported) do assert.matches("this call waits, and .* cannot", text) end
        assert.is_nil(condition.first)
        local ok, text = pcall(rt.run, way(function() rt.sleep(0.001) end))
        assert.is_false(ok)
        assert.matches("this call waits, and .* cannot", text)
      end)
    end

    it("pcall and metamethods are such places on PUC 5.1, and nowhere else", function()
      local condition = rt.condition()
      rt.run(function()
        local ok, text = pcall(function()
          local signalled = condition:wait(0.001)
          return signalled
        end)
        assert.equal(not old, ok)
        if old then
          assert.matches("native_spec%.lua:%d+: .*moonrabbit%.pcall", text)
        else
          assert.is_false(text)
        end
        -- It cannot be told beforehand there, but the words are the same, and nothing is left.
        ok, text = yieldable.pcall(in_index(function() condition:wait(0.001) end))
        assert.equal(not old, ok)
        if old then assert.matches("this call waits, and .*metamethod", text) end
        local other = rt.spawn(function() assert(condition:wait(20)) end)
        rt.sleep(0)
        rt.sleep(0)
        condition:signal()
        eventually(function() return other.over end)
        assert.is_nil(condition.first)
      end)
    end)

    it("the main chunk is none: there the loop runs below", function()
      local condition = rt.condition()
      in_gsub(function() assert.is_false(condition:wait(0.001)) end)()
      assert.is_nil(condition.first)
    end)
  end)

  describe("moonrabbit.runtime.pcall", function()
    it("passes yields on, results and errors back, and current stays right", function()
      rt.run(function()
        local me = rt.current()
        local function f(...)
          assert.equal(me, rt.current())
          rt.sleep(0.001)
          assert.equal(me, rt.current())
          return ...
        end
        local function count(...) return select("#", ...), ... end
        assert.same({ 4, true, 1, nil, 3 }, { count(yieldable.pcall(f, 1, nil, 3)) })
        local object = {}
        assert.same({ false, object }, { yieldable.pcall(function()
          assert(yieldable.pcall(f))
          rt.sleep(0)
          error(object)
        end) })
        assert.is_false((yieldable.pcall(nil)))
        assert.same({ true, "3" }, { yieldable.pcall(tostring, 3) })
      end)
      assert.same({ false, "x" }, { yieldable.pcall(error, "x") })
    end)
  end)

  describe("long turns", function()
    it("are reported with their line", function()
      local reports = {}
      rt.long_turn = 0.02
      rt.on_long_turn = function(seconds, source) reports[#reports + 1] = { seconds, source } end
      rt.run(function()
        rt.sleep(0)
        local deadline = rt.now() + 0.03
        while rt.now() < deadline do end -- luacheck: ignore
        rt.sleep(0)
      end)
      local line, found = debug.getinfo(1, "l").currentline - 2, nil
      for _, report in ipairs(reports) do -- there are others where the machine stood still
        if report[1] >= 0.03 and report[2]:match("native_spec%.lua:" .. line .. "$") then found = report end
      end
      assert.truthy(found)
      assert.equal(reports[#reports][2], rt.turn_source())
    end)

    it("of a task that has ended are its function's", function()
      local source
      rt.long_turn = 0.02
      rt.on_long_turn = function(_, where) source = where end
      rt.run(function()
        rt.spawn(function()
          local deadline = rt.now() + 0.03
          while rt.now() < deadline do end -- luacheck: ignore
        end)
        rt.sleep(0.001)
      end)
      assert.matches("native_spec%.lua:%d+$", source)
    end)

    it("are told to a function that may fail", function()
      local told = {}
      local on_error = rt.on_error
      rt.on_error = function(text) told[#told + 1] = text end
      rt.long_turn = 0.02
      rt.on_long_turn = function() error "it failed" end
      rt.run(function()
        rt.spawn(function()
          local deadline = rt.now() + 0.03
          while rt.now() < deadline do end -- luacheck: ignore
        end)
        rt.sleep(0.001)
      end)
      rt.on_error = on_error
      assert.truthy(#told >= 1)
      assert.matches("on_long_turn: .*it failed", told[1])
    end)
  end)

  describe("signals", function()
    it("run their function in a task, and wake a loop that waits for nothing else", function()
      local condition, got = rt.condition(), nil
      assert(rt.signal("USR1", function(name)
        assert(rt.current())
        rt.sleep(0)
        got = name
        condition:signal()
      end))
      rt.spawn(function() os.execute "kill -USR1 $PPID" end)
      assert.is_true(condition:wait())
      assert.equal("USR1", got)
      assert(rt.signal("USR1", nil))
      assert.is_false((pcall(function() rt.condition():wait() end)))
    end)
  end)

  describe("transports", function()
    local function pair()
      local server = assert(rt.listen("127.0.0.1", 0))
      local client = assert(rt.open({ host = "localhost", port = server:port() }, nil, 20))
      local peer = assert(server:accept())
      server:close()
      return client, peer
    end

    it("read and write, from the main chunk and from tasks", function()
      local client, peer = pair()
      assert(client:write "hello")
      assert.equal("hello", peer:read())
      rt.run(function()
        rt.spawn(function()
          rt.sleep(0.001)
          assert(peer:write "later")
        end)
        assert.equal("la", client:read(2))
        assert.equal("ter", client:read(20))
      end)
      peer:close()
      assert.same({ nil, "closed", "" }, { client:read() })
      client:close()
      client:close()
      assert.same({ nil, "closed", "closed" }, { client:read() })
      assert.same({ nil, "closed", "closed" }, { client:write "x" })
    end)

    it("hold back both ways, and lose nothing", function()
      local client, peer = pair()
      local size = 8 * 1024 * 1024
      local bytes = ("0123456789abcdef"):rep(size / 16)
      local function receive(from)
        local parts, got = {}, 0
        while got < size do
          local part = assert(from:read())
          parts[#parts + 1] = part
          got = got + #part
        end
        return table.concat(parts)
      end
      rt.run(function()
        local left = 2
        for _, transport in ipairs { client, peer } do
          rt.spawn(function()
            assert(transport:write(bytes))
            left = left - 1
          end)
        end
        rt.sleep(0.05) -- both are stuck by now
        assert.equal(2, left)
        local one, two
        rt.spawn(function() one = receive(client) end)
        rt.spawn(function() two = receive(peer) end)
        eventually(function() return one and two end)
        assert.is_true(one == bytes and two == bytes)
        eventually(function() return left == 0 end)
      end)
      client:close()
      peer:close()
    end)

    it("wake who waits when they are closed", function()
      local client, peer = pair()
      local outcome
      rt.run(function()
        rt.spawn(function() outcome = { client:read() } end)
        rt.sleep(0.001)
        client:close()
        rt.sleep(0)
      end)
      assert.same({ nil, "closed", "closed" }, outcome)
      peer:close()
    end)

    it("time out where that is asked for", function()
      local client, peer = pair()
      assert.equal("timeout", (select(2, client:read(1, 0.001))))
      assert.equal("timeout", (select(2, client:write(("x"):rep(64 * 1024 * 1024), 0.01))))
      client:close()
      peer:close()
    end)

    it("do not spin while nobody reads what has come", function()
      local client, peer = pair()
      rt.run(function()
        local reader = rt.spawn(function() client:read() end)
        rt.sleep(0.001)
        rt.cancel(reader)
        peer:write "x"
        rt.sleep(0.01)
        local started = os.clock()
        rt.sleep(0.2)
        assert.is_true(os.clock() - started < 0.1)
        assert.equal("x", client:read())
      end)
      client:close()
      peer:close()
    end)

    it("speak over unix sockets", function()
      local path = os.tmpname()
      os.remove(path)
      local server = assert(rt.listen(path))
      local client = assert(rt.open({ path = path }, nil, 20))
      local peer = assert(server:accept())
      assert(client:write "x")
      assert.equal("x", peer:read())
      client:close()
      peer:close()
      server:close()
      os.remove(path)
      local none, kind, text, temporary = rt.open({ path = path }, nil, 20)
      assert.same({ nil, "refused", "cannot connect to unix:" .. path .. ": no such file or directory", true },
        { none, kind, text, temporary })
    end)

    it("are accepted by several tasks, of which one may give up", function()
      local server, taken, tasks, clients = assert(rt.listen("127.0.0.1", 0)), {}, {}, {}
      rt.run(function()
        for i = 1, 3 do
          tasks[i] = rt.spawn(function()
            local one = assert(server:accept())
            taken[#taken + 1] = one
          end)
        end
        rt.sleep(0.001)
        rt.cancel(tasks[2])
        rt.sleep(0.001)
        for i = 1, 2 do clients[i] = assert(rt.open({ host = "127.0.0.1", port = server:port() }, nil, 20)) end
        local deadline = rt.now() + 20
        while #taken < 2 and rt.now() < deadline do rt.sleep(0.001) end
      end)
      assert.equal(2, #taken)
      for i = 1, 2 do
        clients[i]:close()
        taken[i]:close()
      end
      server:close()
    end)

    it("end a pending accept when the server is closed", function()
      local server = assert(rt.listen("127.0.0.1", 0))
      local outcome
      rt.run(function()
        rt.spawn(function() outcome = { server:accept() } end)
        rt.sleep(0.001)
        server:close()
        rt.sleep(0)
      end)
      assert.same({ nil, "closed", "closed" }, outcome)
    end)
  end)

  describe("transports of an engine", function()
    local core = require "moonrabbit.core"

    local function new_engine(max_buffer)
      local engine = core.engine { vhost = "/", user = "guest", password = "guest", max_buffer = max_buffer }
      engine:start(rt.now())
      return engine
    end

    local function engine_pair(max_buffer)
      local server = assert(rt.listen("127.0.0.1", 0))
      local client = assert(rt.open({ host = "127.0.0.1", port = server:port() }, nil, 20))
      local peer = assert(server:accept())
      server:close()
      return new_engine(max_buffer), client, peer
    end

    it("flush what the engine has, and fill it", function()
      local engine, client, peer = engine_pair()
      assert.is_true(engine:pending() > 0)
      assert.is_true(client:try_flush(engine))
      assert.equal(0, engine:pending())
      assert.is_true(client:flush(engine))
      assert.equal("AMQP\0\0\9\1", peer:read())
      rt.run(function()
        rt.spawn(function()
          rt.sleep(0.001)
          peer:write "AMQP\0\0\9\1"
        end)
        assert.equal(8, client:fill(engine))
      end)
      peer:close()
      assert.same({ nil, "closed", "" }, { client:fill(engine) })
      local event, err = engine:pump()
      assert.equal("closed", event)
      assert.is_table(err)
      assert.same({ nil, "full" }, { client:fill(engine) }) -- it takes nothing any more
      client:close()
      assert.same({ nil, "closed", "closed" }, { client:fill(engine) })
      assert.same({ nil, "closed", "closed" }, { client:flush(engine) })
      assert.same({ nil, "closed", "closed" }, { client:try_flush(engine) })
    end)

    it("are filled without the loop by a script that has nobody else to run", function()
      local engine, client, peer = engine_pair()
      assert(client:flush(engine))
      assert.equal("AMQP\0\0\9\1", peer:read())
      local function fill_alone(seconds)
        local began = rt.now()
        local n, kind, text = client:fill_alone(engine, began + seconds)
        assert.truthy(rt.now() - began < 10, "it waited on, though there was something to do")
        return n, kind, text
      end
      assert.is_nil(fill_alone(20)) -- nobody reads: the engine may be paused
      local reader = rt.spawn(function()
        while client:fill(engine) do end -- luacheck: ignore
      end)
      rt.sleep(0)
      assert.same({ nil, "again" }, { fill_alone(0.6) })
      assert.is_nil(fill_alone(0))
      peer:write "AMQP"
      assert.equal(4, fill_alone(20))
      local ran = false
      rt.spawn(function() ran = true end)
      assert.is_nil(fill_alone(20)) -- that one wants to run
      rt.sleep(0)
      assert.is_true(ran)
      local sleeper = rt.spawn(function() rt.sleep(0.6) end)
      rt.sleep(0)
      assert.same({ nil, "again" }, { fill_alone(20) }) -- until the sleeper's time
      rt.run(function() assert.is_nil(fill_alone(20)) end)
      assert(rt.signal("USR2", function() end))
      assert.is_nil(fill_alone(20)) -- which the loop is to find
      assert(rt.signal "USR2")
      while not sleeper.over do rt.sleep(0) end
      peer:write "\0\0"
      assert.equal(2, fill_alone(20))
      peer:close()
      assert.same({ nil, "closed", "" }, { fill_alone(20) })
      while not reader.over do rt.sleep(0) end
      client:close()
      assert.is_nil(fill_alone(20))
    end)

    it("say when the engine is full, and leave the rest in the socket", function()
      local engine, client, peer = engine_pair()
      assert(client:flush(engine))
      assert.is_string(peer:read())
      local taken, kind = 0, nil
      rt.run(function()
        local writer = rt.spawn(function()
          -- the beginning of a frame far larger than the engine reads ahead, as it seems
          local chunk = ("\3\0\0\0\0\0\0\206"):rep(8192)
          while peer:write(chunk) do end -- luacheck: ignore
        end)
        repeat
          local n, why = client:fill(engine)
          taken, kind = taken + (n or 0), why
        until not n
        rt.cancel(writer)
      end)
      assert.equal("full", kind)
      assert.is_true(taken > 0)
      client:close()
      peer:close()
    end)

    it("wait for the peer to read, and are woken by close", function()
      local engine, client, peer = engine_pair()
      local outcome
      rt.run(function()
        repeat -- the system may still find room for some a moment later
          while client.stream:write(("x"):rep(65536)) do end -- luacheck: ignore
          outcome, engine = nil, new_engine()
          local _, why = client:try_flush(engine)
          if why == "again" then rt.spawn(function() outcome = { client:flush(engine) } end) end
          rt.sleep(0.001)
        until why == "again" and not outcome
        assert.is_true(engine:pending() > 0)
        client:close()
        rt.sleep(0)
      end)
      assert.same({ nil, "closed", "closed" }, outcome)
      peer:close()
    end)
  end)

  describe("open", function()
    it("tells why each address failed", function()
      local port = ports.free()
      local none, kind, text, temporary = rt.open({ host = "localhost", port = port }, nil, 20)
      assert.is_nil(none)
      assert.equal("refused", kind)
      assert.is_true(temporary)
      assert.matches("^cannot connect to localhost:" .. port .. ": %[::1%]:" .. port .. ": .*; 127%.0%.0%.1:" .. port
        .. ": connection refused$", text)
      text = select(3, rt.open({ host = "127.0.0.1", port = port }, nil, 20))
      assert.equal("cannot connect to 127.0.0.1:" .. port .. ": connection refused", text)
    end)

    it("tells that a name is unknown", function()
      local none, kind, text = rt.open({ host = "does-not-exist.invalid", port = 1 }, nil, 60)
      assert.is_nil(none)
      assert.equal("dns", kind)
      assert.matches("^cannot connect to does%-not%-exist%.invalid:1: ", text)
    end)

    it("gives up a TLS server that says nothing, in time", function()
      local server = assert(rt.listen("127.0.0.1", 0))
      local none, kind, text, temporary =
        rt.open({ host = "127.0.0.1", port = server:port() }, { verify = false }, 0.05)
      assert.is_nil(none)
      assert.equal("timeout", kind)
      assert.matches("no answer in time", text)
      assert.is_true(temporary)
      server:close()
    end)

    it("can be cancelled while it waits", function()
      local server = assert(rt.listen("127.0.0.1", 0))
      rt.run(function()
        local task = rt.spawn(function() rt.open({ host = "127.0.0.1", port = server:port() }, { verify = false }) end)
        local peer = server:accept()
        rt.cancel(task)
        assert(peer:read(65536)) -- what the handshake began with
        assert.equal("closed", (select(2, peer:read())))
      end)
      server:close()
    end)

    -- A stream with TLS that wants these, one after the other, whatever it does; and what was waited for.
    local function wanting(...)
      local wants, waits = { ... }, {}
      local function work()
        if wants[1] then return nil, "again" end
        return "x"
      end
      local stream = {
        handshake = work, fill = work, flush = work, read = work, settle = work,
        fd = function() return 0 end, tls_info = function() return "TLS" end,
        wants = function() return table.remove(wants, 1) end,
      }
      return stream, waits, {
        watch = function() return {} end, unwatch = function() end,
        wait = function(_, events)
          waits[#waits + 1] = events
          return true
        end,
      }
    end

    it("waits for what the stream wants, as all that is done on it does", function()
      local net, open = require "moonrabbit.net", require "moonrabbit.runtime.shared.open"
      local transport = require "moonrabbit.runtime.shared.transport"
      local connect = net.connect
      local stream, waits, descriptors = wanting("w", "r", "w")
      net.connect = function() return stream end
      local opened = open.of(descriptors, function(one) return one end)({ host = "127.0.0.1", port = 1 }, nil, 20)
      net.connect = connect
      assert.equal(stream, opened)
      assert.same({ "w", "r", "w" }, waits)
      for _, method in ipairs { "fill", "flush", "read", "write" } do
        stream, waits, descriptors = wanting("w", "r", "w")
        local secure = transport.of(descriptors)(stream)
        assert.truthy(secure[method](secure, method == "write" and "" or nil), method)
        assert.same({ "w", "r", "w" }, waits, method)
      end
    end)

    it("keeps no context of files for those who name none, nor the other way round", function()
      local endpoint = { host = "127.0.0.1", port = ports.free() }
      assert.equal("refused", select(2, rt.open(endpoint, { verify = false }, 20)))
      for _, option in ipairs { "cert", "key" } do -- an authority is read where it is asked only
        local _, kind = rt.open(endpoint, { verify = false, [option] = "/there/is/none" }, 20)
        assert.equal("tls", kind, option)
      end
      assert.equal("refused", select(2, rt.open(endpoint, { verify = false }, 20)))
    end)

    it("makes TLS connections, and says what is wrong with a certificate", function()
      local folder = tls_support.certificates()
      local server = tls_support.server(folder, "server")
      local endpoint = { host = "localhost", port = server.port }
      local transport = assert(rt.open(endpoint, { ca = folder .. "/ca.pem" }, 20))
      assert(transport:write "hello\n")
      local answer = ""
      while #answer < 6 do answer = answer .. assert(transport:read()) end
      assert.equal("olleh\n", answer)
      assert.matches("^TLSv1", transport:tls_info())
      transport:close()
      local _, kind, text, temporary =
        rt.open(endpoint, { ca = folder .. "/ca.pem", server_name = "elsewhere" }, 20)
      assert.is_nil(_)
      assert.equal("tls", kind) -- though ::1 refused
      assert.matches("host name mismatch: certificate is for localhost, 127%.0%.0%.1$", text)
      assert.is_false(temporary)
      -- An address that never answers takes its share of the time only.
      local silent = rt.listen("::1", server.port)
      if silent then
        assert(rt.open(endpoint, { ca = folder .. "/ca.pem" }, 4)):close()
        silent:close()
      end
      _, kind, text, temporary = rt.open(endpoint, { ca = folder .. "/missing" }, 20)
      assert.same({ nil, "tls", false }, { _, kind, temporary })
      assert.matches("tls%.ca", text)
      server.stop()
      tls_support.remove(folder)
    end)
  end)
end)
