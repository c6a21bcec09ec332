-- What the commands make of a broker that is slow, refuses, or is gone when the acks should leave: the connection is
-- made up. Time is too, but for the signal.
local process = require "support.process"

local moonrabbit_module, connect, output = "moonrabbit", nil, nil

describe("moonrabbit's commands", function()
  local saved, complaints, clock

  before_each(function()
    saved = { module = package.loaded[moonrabbit_module] }
    connect, output = require "moonrabbit.cli.connect", require "moonrabbit.cli.output"
    saved.now, saved.complain, saved.write, saved.on_stop = connect.now, output.complain, output.write, connect.on_stop
    complaints, clock = {}, 100
    output.complain = function(text) complaints[#complaints + 1] = tostring(text) end
    output.write = function() return true end
    connect.now = function() return clock end
    connect.on_stop = function() return function() end end
  end)

  after_each(function()
    package.loaded[moonrabbit_module] = saved.module
    connect.now, output.complain, output.write = saved.now, saved.complain, saved.write
    connect.on_stop = saved.on_stop
  end)

  local function failure(kind) return setmetatable({ kind = kind }, { __tostring = function() return kind end }) end

  local function connected(conn)
    conn.call_timeout = 10
    conn.close = conn.close or function() return true end
    package.loaded[moonrabbit_module] = { connect = function() return conn end }
    return conn
  end

  local url = "amqp://none.invalid/"

  describe("publish", function()
    local waits, sent

    -- settle(n): seconds that the n-th publish takes, or nil for ever; refuse(n): the kind of error of send_async.
    local function run(args, settle, refuse)
      waits, sent = {}, 0
      connected {
        publisher = function()
          return { send_async = function()
            sent = sent + 1
            local n = sent
            local kind = refuse and refuse(n)
            if kind then
              clock = clock + 10
              return nil, failure(kind)
            end
            local due = settle(n) and clock + settle(n)
            return { wait = function(_, timeout)
              waits[#waits + 1] = timeout
              if due and due <= clock + timeout then
                clock = math.max(clock, due)
                return true
              end
              clock = clock + timeout
              return nil, failure "timeout"
            end }
          end }
        end,
      }
      args.url, args.command, args.exchange, args.window = url, "publish", "", args.window or 1000
      args.routing_key, args.body = "q", "x"
      return require "moonrabbit.cli.publish".run(args)
    end

    it("gives a broker that never confirms the timeout once, not for each message", function()
      assert.equal(1, run({ count = 50, timeout = 10 }, function() end))
      assert.equal(50, sent)
      assert.equal(110, clock)
      assert.equal(50, #waits)
      assert.same({ "50 messages: timeout" }, complaints)
    end)

    it("stops sending once the broker was too slow", function()
      assert.equal(1, run({ count = 50, timeout = 10, window = 5 }, function() end))
      assert.equal(5, sent)
      assert.equal(110, clock)
    end)

    it("gives the whole time again with each answer", function()
      assert.equal(0, run({ count = 5, timeout = 10 }, function(n) return n * 8 end))
      assert.equal(140, clock)
      assert.same({}, complaints)
    end)

    for _, kind in ipairs { "blocked", "overflow", "timeout" } do
      it("stops when the next one is refused: " .. kind, function()
        assert.equal(1, run({ count = 50, timeout = 10 }, function() return 0 end,
          function(n) return n > 3 and kind end))
        assert.equal(4, sent)
        assert.equal(110, clock)
        assert.same({ kind }, complaints)
      end)
    end

    it("flushes for lines that may be long in coming, not for those of a file", function()
      local script = process.file [[
        local flushed = 0
        package.loaded.moonrabbit = { connect = function()
          return {
            publisher = function()
              return { send_async = function() return { wait = function() return true end } end }
            end,
            flush = function() flushed = flushed + 1 return true end,
            close = function() return true end,
          }
        end }
        local code = require "moonrabbit.cli.publish".run {
          url = "amqp://none.invalid/", command = "publish", exchange = "", routing_key = "q", window = 1000,
        }
        print(code, flushed < 10 and "few flushes" or flushed)
      ]]
      local result = process.run({ script }, { stdin = ("line\n"):rep(3000) })
      os.remove(script)
      assert.equal("3000 published, 3000 confirmed\n0\tfew flushes\n", result.out, result.err)
    end)

    it("ends within a second of SIGINT, whatever is still to be confirmed", function()
      local script = process.file [[
        local native = require "moonrabbit.runtime.native"
        local closed = native.condition()
        local gone
        package.loaded.moonrabbit = { connect = function()
          return {
            publisher = function()
              return { send_async = function()
                return { wait = function(_, timeout)
                  if not gone then
                    io.stdout:write("waiting\n")
                    io.stdout:flush()
                    closed:wait(timeout)
                  end
                  return nil, setmetatable({ kind = gone and "closed" or "timeout" }, { __tostring = function(e)
                    return e.kind
                  end })
                end }
              end }
            end,
            close = function() gone = true closed:broadcast() return true end,
          }
        end }
        local code = require "moonrabbit.cli.publish".run {
          url = "amqp://none.invalid/", command = "publish", exchange = "", routing_key = "q", window = 1000,
          body = "x", count = 20, timeout = 30,
        }
        os.exit(code)
      ]]
      local running = process.start({ script })
      assert.is_true(running:await("waiting\n"), running:err())
      local now = require "moonrabbit.runtime.native".now
      local began = now()
      running:signal "INT"
      assert.equal(130, running:wait(10), running:err())
      assert.is_true(now() - began < 5)
      assert.truthy(running:out():find("20 published, 0 confirmed, 20 failed", 1, true), running:out())
      running:stop()
      os.remove(script)
    end)
  end)

  describe("consume and get", function()
    local function message(settled)
      return setmetatable({ body = "b", properties = {}, routing_key = "q", exchange = "" }, { __index = {
        ack = settled, reject = settled, nack = function() return true end,
      } })
    end

    local function run(command, mode, settled, closed)
      local given
      local conn = connected { close = closed }
      conn.channel = function()
        return {
          get = function()
            if given then return nil end
            given = true
            return message(settled)
          end,
          consume = function()
            return {
              receive = function()
                if given then return nil, failure "timeout" end
                given = true
                return message(settled)
              end,
              cancel = function() return true end,
            }
          end,
        }
      end
      return require("moonrabbit.cli." .. command).run {
        url = url, command = command, queue = "q", ack_mode = mode, count = 1, prefetch = 100, quiet = true,
      }
    end

    local function fine() return true end
    local function refused() return nil, failure "closed" end

    for _, command in ipairs { "consume", "get" } do
      for _, mode in ipairs { "ack", "reject" } do
        it(("exit with 1 when an %s could not be sent: %s"):format(mode, command), function()
          assert.equal(1, run(command, mode, refused, fine))
          assert.equal(1, #complaints)
          assert.matches(mode .. "s could not be sent, .*closed", complaints[1])
        end)

        it(("exit with 1 when the close did not take the %ss along: %s"):format(mode, command), function()
          assert.equal(1, run(command, mode, fine, refused))
          assert.equal(1, #complaints)
          assert.matches(mode .. "s may not have reached the broker: closed", complaints[1])
        end)
      end

      it("exit with 0 when all went well, or nothing was to be said: " .. command, function()
        assert.equal(0, run(command, "ack", fine, fine))
        assert.equal(0, run(command, "none", fine, refused))
        assert.equal(0, run(command, "requeue", fine, refused))
        assert.same({}, complaints)
      end)
    end
  end)
end)
