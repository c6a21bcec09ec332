local moonrabbit = require "moonrabbit"

describe("moonrabbit", function()
  it("loads its parts when they are asked for", function()
    local loaded = {}
    for name in pairs(package.loaded) do
      if name:find "^moonrabbit" then loaded[name] = package.loaded[name] end
    end
    for name in pairs(loaded) do package.loaded[name] = nil end
    local fresh = require "moonrabbit"
    assert.is_nil(package.loaded["moonrabbit.core"])
    assert.is_nil(package.loaded["moonrabbit.net"])
    for name in pairs(package.loaded) do
      if name:find "^moonrabbit" then package.loaded[name] = nil end
    end
    for name, module in pairs(loaded) do package.loaded[name] = module end
    assert.is_nil(fresh.no_such_part)
  end)

  it("has null and exact types", function()
    assert.equal("userdata", type(moonrabbit.null))
    assert.equal("function", type(moonrabbit.types.int64))
  end)

  it("runs tasks", function()
    local order = {}
    local result = moonrabbit.run(function(a)
      moonrabbit.spawn(function() order[#order + 1] = "spawned" end)
      moonrabbit.sleep(0.01)
      order[#order + 1] = "slept"
      return a
    end, "result")
    assert.equal("result", result)
    assert.same({ "spawned", "slept" }, order)
  end)

  it("has a pcall that yields", function()
    local ok, err = moonrabbit.run(function()
      return moonrabbit.pcall(function()
        moonrabbit.sleep(0.001)
        error("boom", 0)
      end)
    end)
    assert.is_false(ok)
    assert.equal("boom", err)
  end)

  describe("connect", function()
    local function complain(...)
      local args = { ... }
      local ok, message = pcall(function()
        local conn, err = moonrabbit.connect(args[1])
        return conn, err
      end)
      assert.is_false(ok)
      assert.matches("facade_spec.lua:", message)
      return message
    end

    it("throws for what is no option", function()
      assert.matches("unknown option 'usr' %(did you mean 'user'", complain { usr = "x" })
      assert.matches("option 'heartbeat' must be an integer", complain { heartbeat = "soon" })
      assert.matches("tls: unknown option 'cafile'", complain { tls = { cafile = "x" } })
      assert.matches("option 'mechanism' must be", complain { mechanism = "plain" })
      assert.matches("option 'endpoints' must be a list of URIs", complain { endpoints = {} })
      assert.matches("exclude each other", complain { uri = "amqp://", endpoints = { "amqp://" } })
      assert.matches("a URI or a table", complain(7))
      assert.matches("invalid AMQP URI", complain "http://example.org")
      assert.matches("there is no runtime 'nope'", complain { runtime = "nope" })
      assert.matches("lacks the function", complain { runtime = {} })
      assert.matches("reconnect: unknown option 'frist' %(did you mean 'first'", complain { reconnect = { frist = 1 } })
      assert.matches("reconnect: option 'jitter' must be", complain { reconnect = { jitter = 2 } })
      assert.matches("reconnect: option 'attempts' must be", complain { reconnect = { attempts = 0.5 } })
      assert.matches("reconnect: option 'factor' must be", complain { reconnect = { factor = 0 } })
      assert.matches("option 'reconnect' must be", complain { reconnect = "yes" })
      assert.matches("recover: unknown option 'filtre' %(did you mean 'filter'",
        complain { recover = { filtre = print } })
    end)

    it("does not show the password in what it throws", function()
      assert.is_nil(complain("amqp://user:s3cr3t@host:port"):find("s3cr3t", 1, true))
      assert.is_nil(complain({ password = "s3cr3t", heartbeet = 1 }):find("s3cr3t", 1, true))
      assert.is_nil(complain({ password = { "s3cr3t" } }):find("s3cr3t", 1, true))
    end)

    it("refuses the native runtime inside nginx and says what to use", function()
      rawset(_G, "ngx", { get_phase = function() end })
      local ok, message = pcall(moonrabbit.connect, "amqp://")
      rawset(_G, "ngx", nil)
      assert.is_false(ok)
      assert.matches("moonrabbit.resty", message)
    end)
  end)

  it("throws for what is no option of a pool", function()
    local ok, message = pcall(function() return moonrabbit.pool { conections = 2 } end)
    assert.is_false(ok)
    assert.matches("did you mean 'connections'", message)
    assert.is_false((pcall(moonrabbit.pool, { connect = { usr = 1 } })))
  end)

  it("throws for a sleep of no number, naming it", function()
    for _, case in ipairs { { "x", "a string" }, { nil, "a nil" }, { 0 / 0, "NaN" } } do
      local ok, message = pcall(moonrabbit.sleep, case[1])
      assert.is_false(ok)
      assert.matches("sleep: seconds must be a number, not " .. case[2], message)
    end
  end)

  describe("names the line that passed a wrong option to publish", function()
    local load = rawget(_G, "loadstring") or load
    local library, channel

    before_each(function()
      local broker = require "support.fake_broker".new()
      broker:open()
      channel = broker:channel(true)
      -- As the library's modules do it: one calls another, and that the core's function.
      local function module(name, text)
        return assert(load(text, "@/somewhere/lua/moonrabbit/" .. name .. ".lua"))()
      end
      library = {
        direct = module("channel/publishing", [[return function(channel, body, opts)
          local confirmation, flush = channel:publish(body, opts)
          return confirmation, flush
        end]]),
      }
      library.through = module("publisher", [[return function(direct, channel, body, opts)
          local confirmation, flush = direct(channel, body, opts)
          return confirmation, flush
        end]])
    end)

    local wrong = { { routing_key = 5 }, { routingkey = "q" }, { priority = 300 }, { persistent = 1 }, { [1] = "x" },
      { expiration = true }, { exchange = ("e"):rep(256) }, 5 }

    local function line(text, number)
      assert.truthy(text:find("^/home/user/moonrabbit/program%.lua:" .. number .. ": "), text)
    end

    local function program(text) return assert(load(text, "@/home/user/moonrabbit/program.lua")) end

    it("directly, and through another module", function()
      local direct = program [[local direct, channel, opts = ...

        local confirmation = direct(channel, "x", opts)
        return confirmation]]
      local through = program [[local through, direct, channel, opts = ...


        local confirmation = through(direct, channel, "x", opts)
        return confirmation]]
      for _, opts in ipairs(wrong) do
        line(select(2, pcall(direct, library.direct, channel, opts)), 3)
        line(select(2, pcall(through, library.through, library.direct, channel, opts)), 4)
      end
    end)

    it("for a body too", function()
      local direct = program [[local direct, channel, body = ...
        local confirmation = direct(channel, body)
        return confirmation]]
      line(select(2, pcall(direct, library.direct, channel, 5)), 2)
    end)

    it("after a tail call that of the next one", function()
      local tail = program [[local direct, channel, opts = ...
        local function tail() return direct(channel, "x", opts) end
        local confirmation = tail()
        return confirmation]]
      for _, opts in ipairs(wrong) do line(select(2, pcall(tail, library.direct, channel, opts)), 3) end
    end)
  end)
end)
