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
      assert.matches("unknown option 'reconnect'", complain { reconnect = true })
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
end)
